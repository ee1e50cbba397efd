"""`launcher.open_run`: a run from Python, finished or live. No torch, but to load checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, Retention
from launcher.config.coerce import expand
from launcher.config.problem import Mistake, nearest
from launcher.errors import RunError, UsageError
from launcher.runs import run as reading
from launcher.runs.records import Array
from launcher.runs.status import RunStatus
from launcher.telemetry.rundir import POSITION

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run, as its manifest tells it. `damaged` says what is wrong with the
    manifest, "" where nothing is; `load` looks at the whole of it."""

    step: int
    path: Path
    epoch: int | None = None
    samples: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    damaged: str = ""

    def load(self) -> dict[str, Any]:
        """The training state, on the CPU: `model`, `ema` (None where nothing is averaged),
        `optimizer`, `progress` and the rest. Its files are verified, and nothing in them is run.

        Raises RunError where they are not what the manifest says, or are gone.
        """
        try:
            return CheckpointStore(self.path.parent).load(self.step)
        except DamagedCheckpoint as error:
            gone = "" if self.path.exists() else ", for it is gone: the run keeps others by now"
            raise RunError(f"{self.path} cannot be loaded{gone}: {error}") from error


class OpenRun:
    """A run directory. All of it is read when it is asked for, so of a live run as it is then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        run = self._read()
        return f"<run {self.path}: {run.state}, step {run.step}>"

    def _read(self) -> reading.Run:
        return reading.open_run(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """Every key's value by its dotted name."""
        return self._read().config

    @property
    def status(self) -> RunStatus | None:
        """state, step, epoch, reason, ...; None of another program's run, or before its first."""
        return self._read().status

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened, one dict each: start, checkpoint, resume, failure, ..."""
        return self._read().history

    @property
    def environment(self) -> dict[str, Any]:
        """The command, versions, hosts, devices of the newest attempt."""
        return self._read().environment

    @property
    def failure(self) -> dict[str, Any]:
        """What the run failed with; {} where it did not."""
        return self._read().failure

    def columns(self, *names: str) -> dict[str, Array]:
        """The records as arrays of one length: a row a step, with `step`, `epoch`, `samples`,
        `time`, and the metrics of these names (all, where none is given).

        A metric is NaN at a step without it, and where its value was none; of rows at which none
        of the given metrics has been recorded there are none. `time` is that of the step's last
        record. Raises UsageError for a metric that the run has not recorded.
        """
        table = self._read().table().in_order()
        for name in names:
            if name not in table.columns:
                hint = nearest(name, table.columns)
                near = f" (did you mean {hint}?)" if hint else ""
                raise UsageError(f"{self.path} has recorded no {name!r} so far{near}")
        chosen = {name: table.columns[name] for name in names or sorted(table.columns)}
        steps = table.position["step"]
        rows = np.arange(len(steps))
        if names:
            rows = np.unique(np.concatenate([rows for rows, _ in chosen.values()]))
        every = np.unique(steps[rows])
        # Of each step the last record.
        last = len(rows) - 1 - np.unique(steps[rows][::-1], return_index=True)[1]
        found = {name: table.position[name][rows][last] for name in POSITION}
        for name in ("step", "epoch", "samples"):
            if np.all(np.isfinite(found[name])):  # other programs record no samples
                found[name] = found[name].astype(np.int64)
        for name, (of, values) in chosen.items():
            found[name] = np.full(len(every), np.nan)
            found[name][np.searchsorted(every, steps[of])] = values
        return found

    def frame(self, *names: str) -> pandas.DataFrame:
        """`columns` as a pandas DataFrame, by step. Raises UsageError where there is no pandas."""
        try:
            import pandas
        except ImportError as error:
            raise UsageError(
                "frame() needs pandas: pip install pandas. columns() gives the same as arrays."
            ) from error
        return pandas.DataFrame(self.columns(*names)).set_index("step")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that the run has kept, oldest first."""
        run = self._read()
        store = CheckpointStore(run.directory.checkpoints)
        found = []
        for step in store.steps() if run.ours else ():
            path = store.path(step)
            try:
                m = store.manifest(step)
            except DamagedCheckpoint as error:
                if path.exists():  # else a live run has just dropped it
                    found.append(Checkpoint(step, path, damaged=str(error)))
                continue
            found.append(Checkpoint(step, path, m.get("epoch"), m.get("samples"), m["metrics"]))
        return found

    def checkpoint(self, which: int | str = "last") -> Checkpoint:
        """The checkpoint of a step, the "last" one, or the "best" by CHECKPOINT.METRIC."""
        found = {one.step: one for one in self.checkpoints if not one.damaged}
        if which == "best":
            config = self.config
            metric, mode = (config.get(f"CHECKPOINT.{name}", "") for name in ("METRIC", "MODE"))
            rule = Retention(metric=metric, mode=mode or "min")
            ranked = rule.ranked({"step": c.step, "metrics": c.metrics} for c in found.values())
            if not ranked:
                raise UsageError(f"no checkpoint of {self.path} has {rule.metric or 'a metric'}")
            return found[ranked[0]]
        step = max(found, default=None) if which == "last" else which
        if step not in found:
            kept = ", ".join(map(str, found)) or "none"
            raise UsageError(f"{self.path} has no checkpoint {which!r}; its steps are {kept}")
        return found[step]


def open_run(path: str | os.PathLike[str]) -> OpenRun:
    """The run in a directory, finished or live; or the only one below it, or another program's.

    Raises UsageError where there is none.
    """
    try:
        found = reading.open_run(Path(expand(os.fspath(path))))
    except Mistake as mistake:
        raise UsageError(f"{os.fspath(path)}: {mistake}") from None
    return OpenRun(found.path if found.ours else found.records)
