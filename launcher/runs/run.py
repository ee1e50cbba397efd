"""A run as its directory tells it, finished or live, ours or another program's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import orjson
import yaml

from launcher.config.units import parse_duration
from launcher.errors import RunError, UsageError
from launcher.runs import foreign
from launcher.runs.index import Index, Series, Summary, prune, state
from launcher.runs.records import Damage, Table, read_objects, read_table
from launcher.runs.status import RunStatus, read_status
from launcher.telemetry.rundir import RunDirectory

PARALLEL = 64 << 20  # bytes to parse from which on it is worth starting processes
# Parts of a metric's name that tell which way is better, where the run's config does not.
BETTER = {
    "min": ("loss", "err", "perplexity", "ppl", "rmse", "mae", "mse", "step_s", "data_s"),
    "max": (
        "acc",
        "map",
        "iou",
        "f1",
        "auc",
        "recall",
        "precision",
        "bleu",
        "psnr",
        "per_s",
        "/ap",
    ),
}


class Run:
    """Everything is read when it is asked for, and read as far as it can be."""

    def __init__(self, path: Path, kind: str, records: Path, name: str = "") -> None:
        self.path, self.kind, self.records = path, kind, records
        self.name = name or str(path)
        self.directory = RunDirectory(path)

    @property
    def ours(self) -> bool:
        return self.kind == "launcher"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted key -> value, {} where there is none that can be read. Runs no code."""
        for name in ("config.yaml", "hparams.yaml"):  # ours and detectron2's; Lightning's
            try:
                text = (self.path / name).read_text(encoding="utf-8")
                # libyaml, where PyYAML has it, is ten times as fast.
                found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(found, dict):
                return dict(_flatten(found))
        return {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return _object(self.directory.environment)

    @cached_property
    def failure(self) -> dict[str, Any]:
        return _object(self.directory.failure) if self.ours else {}

    @cached_property
    def _history(self) -> tuple[list[dict[str, Any]], list[Damage]]:
        return read_objects(self.directory.history) if self.ours else ([], [])

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._history[0]

    @cached_property
    def status(self) -> RunStatus | None:
        """None where there is none, as in another program's run, or none that can be read."""
        try:
            return read_status(self.path) if self.ours else None
        except UsageError:
            return None

    @property
    def state(self) -> str:
        return self.status.state if self.status is not None else "?"

    def table(self, keys: Sequence[str] = ()) -> Table:
        """All records, with at least these metrics. Raises RunError where their file cannot be read
        at all."""
        try:
            if self.ours:
                return read_table(self.records, keys=keys)
            return foreign.read(self.kind, self.records)
        except OSError as error:
            raise RunError(f"{self.records} cannot be read: {error.strerror}") from error

    @cached_property
    def summary(self) -> Summary:
        """The records in short, from the index where that is possible."""
        try:
            if self.records.exists():
                return Index(self.records).summary(None if self.ours else self.table)
            return Summary()
        except (OSError, RunError) as error:
            return Summary(damaged=[Damage(0, str(error))], damaged_count=1)

    def indexed(self) -> bool:
        """Take the summary without its curves from the index; False where it is not up to date."""
        try:
            kept = Index(self.records).kept()
        except OSError:
            return False
        if kept is not None:
            self.summary = kept
        return kept is not None

    @property
    def damaged(self) -> list[str]:
        """Lines that could not be read, as messages."""
        told = [f"{self.records}:{d.line}: {d.reason}" for d in self.summary.damaged]
        more = self.summary.damaged_count - len(told)
        told += [f"{self.records}: {more} more"] if more > 0 else []
        return told + [f"{self.directory.history}:{d.line}: {d.reason}" for d in self._history[1]]

    @cached_property
    def metric(self) -> str:
        """The metric that the run is judged by: its CHECKPOINT.METRIC, else a loss."""
        keys = sorted(self.summary.series)
        named = self.config.get("CHECKPOINT.METRIC") if self.ours else None
        losses = [key for key in keys if "loss" in key]
        evaluated = [key for key in losses if "val" in key]
        return next((key for key in (named, *evaluated, *losses) if key in keys), named or "")

    def mode(self, key: str) -> str:
        """ "min" or "max": which values of a metric are better; "" where that is not known."""
        if self.ours and key == self.config.get("CHECKPOINT.METRIC"):
            return str(self.config.get("CHECKPOINT.MODE", ""))
        name = key.lower()
        return next((m for m, parts in BETTER.items() if any(p in name for p in parts)), "")

    def best(self, key: str) -> tuple[float, float] | None:
        """Step and value of a metric's best record."""
        series, mode = self.summary.series.get(key, Series()), self.mode(key)
        return getattr(series, mode) if mode else None

    @property
    def step(self) -> int:
        last = self.summary.last.get("step") or 0
        return max(int(last), self.status.step if self.status is not None else 0)

    @property
    def total_steps(self) -> int | None:
        """How many steps the run is to have; None where nothing says it."""
        if isinstance(total := self.environment.get("total_steps"), int):
            return total
        try:
            duration = parse_duration(str(self.config.get("TRAIN.DURATION", "")))
        except ValueError:
            duration = None
        if duration is not None and duration.unit == "step":
            return int(duration.amount)
        return self.step if self.state == "completed" else None

    @property
    def updated(self) -> float | None:
        """When it last gave a sign of life, in Unix seconds."""
        times = [self.summary.last.get("time"), self.status.updated if self.status else None]
        known = [t for t in times if t]
        if not known and self.records.exists():
            return self.records.stat().st_mtime
        return max(known, default=None)

    @property
    def duration(self) -> float | None:
        """Seconds under way, the pauses between its attempts left out."""
        begun = [
            place for place, e in enumerate(self.history) if e.get("event") in ("start", "resume")
        ]
        if not begun:
            first, last = self.summary.first.get("time"), self.summary.last.get("time")
            return last - first if first is not None and last is not None else None
        total = 0.0
        for place, until in zip(begun, [*begun[1:], len(self.history)], strict=True):
            times = [e["time"] for e in self.history[place:until] if _is_number(e.get("time"))]
            if until == len(self.history) and self.updated is not None:
                times.append(self.updated)
            total += max(times) - times[0] if times else 0.0
        return total

    def value(self, key: str) -> Any:
        """What a key means to --where, --sort and --columns: a column of `list`, a config key, or a
        metric's last value; min:, max: and best: before a metric name its extremes."""
        if key in COLUMNS:
            return COLUMNS[key](self)
        if key in self.config:
            return self.config[key]
        which, _, rest = key.partition(":")
        if which in ("min", "max", "best", "last") and rest:
            key = rest
        series = self.summary.series.get(key)
        if series is None:
            return None
        found = self.best(key) if which == "best" else getattr(series, which, series.last)
        return None if found is None else found[1]


def _judged(run: Run, which: str) -> Any:
    return run.value(f"{which}:{run.metric}")


COLUMNS = {
    "run": lambda run: run.name,
    "kind": lambda run: run.kind,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "total": lambda run: run.total_steps,
    "epoch": lambda run: run.summary.last.get("epoch"),
    "records": lambda run: run.summary.records,
    "metric": lambda run: run.metric,
    "best": lambda run: _judged(run, "best"),
    "last": lambda run: _judged(run, "last"),
    "age": lambda run: None if run.updated is None else time.time() - run.updated,
    "duration": lambda run: run.duration,
}


def open_run(path: Path, name: str = "") -> Run:
    """The run in a directory, or the only one below it, or that of a file of records.

    Raises UsageError where there is none.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if (run := _at(path, name)) is not None:
        return run
    below = list(find(path)) if path.is_dir() else []
    if len(below) == 1:
        return below[0]
    hint = f"; below it are {', '.join(str(r.path) for r in below[:5])}" if below else ""
    raise UsageError(f"{path} holds no run{hint}")


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, each named by as much of its path as sets it apart."""
    runs = [open_run(path) for path in paths]
    parts = [run.path.resolve().parts for run in runs]
    for run, own in zip(runs, parts, strict=True):
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                break
        run.name = "/".join(own[-length:])
    return runs


def find(root: Path) -> Iterator[Run]:
    """Every run in and below a directory, by name; what a run holds is not searched."""
    if (run := _at(root, root.name or str(root))) is not None:
        yield run
        return
    for folder, below, _ in os.walk(root):
        here = Path(folder)
        runs = {}
        for name in sorted(below):
            if not name.startswith("."):
                runs[name] = _at(here / name, str((here / name).relative_to(root)))
        yield from (run for run in runs.values() if run is not None)
        below[:] = [name for name, run in runs.items() if run is None]


def _at(path: Path, name: str) -> Run | None:
    directory = RunDirectory(path)
    if directory.status.exists() or directory.metrics.exists():
        return Run(path, "launcher", directory.metrics, name)
    if path.name == "metrics.jsonl":
        return Run(path.parent, "launcher", path, name)
    if (found := foreign.recognise(path)) is not None:
        return Run(path if path.is_dir() else path.parent, *found, name)
    if directory.config.exists() and (directory.environment.exists() or directory.history.exists()):
        return Run(path, "launcher", directory.metrics, name)
    return None


def load_summaries(runs: Sequence[Run], workers: int) -> None:
    """Have every run's summary, without its curves, at hand; much that is new is parsed by several
    processes. What stays in memory are a few numbers a metric."""
    pending = [run for run in runs if not run.indexed()]
    sizes = {id(run): state(run.records)[2] for run in pending if run.records.exists()}
    pending.sort(key=lambda run: -sizes.get(id(run), 0))
    workers = min(workers, len(pending))
    if workers < 2 or sum(sizes.values()) < PARALLEL:
        for run in pending:
            run.summary = _without_curves(run)
    else:
        # Not fork: numpy has threads.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for run, summary in zip(pending, pool.map(_without_curves, pending), strict=True):
                run.summary = summary
    if pending:
        prune()


def _without_curves(run: Run) -> Summary:
    summary = run.summary
    for series in summary.series.values():
        series.curve = series.curve[:0]
    return summary


def _flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _object(path: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
