"""A run as its directory tells it, finished or live, ours or another program's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import orjson
import yaml

from launcher.config.units import parse_duration
from launcher.errors import UsageError
from launcher.runs import foreign
from launcher.runs.index import OURS, Series, Summary, index_file, prune, read, summarize
from launcher.runs.records import Damage, Table, read_objects
from launcher.runs.status import RunStatus, read_status
from launcher.telemetry.rundir import RunDirectory

PARALLEL = 64 << 20  # bytes without an index from which on it is worth starting processes
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

    def __init__(self, path: Path, kind: str, records: Path, name: str) -> None:
        self.path, self.kind, self.records = path, kind, records
        self.name = printable(name)
        self.directory = RunDirectory(path)

    @property
    def ours(self) -> bool:
        return self.kind == OURS

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted key -> value, {} where there is none that can be read. Runs no code."""
        for name in ("config.yaml", "hparams.yaml"):  # ours and detectron2's; Lightning's
            try:
                text = (self.path / name).read_text(encoding="utf-8")
                # libyaml, where PyYAML has it, is ten times as fast.
                found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                if isinstance(found, dict):
                    return dict(_flatten(found))
            except (OSError, ValueError, RecursionError, yaml.YAMLError):
                continue
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

    @property
    def attempts(self) -> list[int]:
        """The places in the history where the run was started or resumed."""
        begun = ("start", "resume")
        return [place for place, e in enumerate(self.history) if e.get("event") in begun]

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

    def table(self) -> Table:
        """All records, as they stand. Raises OSError where their file cannot be read at all."""
        return read(self.kind, self.records) if self.records.exists() else Table.join([])

    @cached_property
    def summary(self) -> Summary:
        """The records in short, from the index where that is possible."""
        return _summary(self.kind, self.records)

    @property
    def damaged(self) -> list[str]:
        """Lines that could not be read, as messages."""
        files = ((self.records, self.summary.damaged), (self.directory.history, self._history[1]))
        return [f"{file}:{d.line}: {d.reason}" for file, damaged in files for d in damaged]

    @property
    def metric(self) -> str:
        """The metric that the run is judged by: its CHECKPOINT.METRIC, else a loss."""
        keys = sorted(self.summary.series)
        named = self.config.get("CHECKPOINT.METRIC", "") if self.ours else ""
        losses = [key for key in keys if "loss" in key]
        evaluated = [key for key in losses if "val" in key]
        return next((key for key in (named, *evaluated, *losses) if key in keys), str(named))

    def mode(self, key: str) -> str:
        """ "min" or "max": which values of a metric are better; "" where that is not known."""
        if self.ours and key == self.config.get("CHECKPOINT.METRIC"):
            return str(self.config.get("CHECKPOINT.MODE", ""))
        name = key.lower()
        return next((m for m, parts in BETTER.items() if any(p in name for p in parts)), "")

    def best(self, key: str) -> tuple[float, float] | None:
        """Step and value of a metric's best record."""
        series, mode = self.summary.series.get(key, Series()), self.mode(key)
        return {"min": series.min, "max": series.max}.get(mode)

    @property
    def step(self) -> int:
        last = self.summary.last.get("step") or 0
        return max(int(last), self.status.step if self.status is not None else 0)

    @property
    def total_steps(self) -> int | None:
        """How many steps the run is to have; None where nothing says it, as in older runs whose
        duration is in epochs."""
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
        known = [self.summary.last.get("time"), self.status.updated if self.status else None]
        times = [time for time in known if time]
        if not times and self.records.exists():
            return self.records.stat().st_mtime
        return max(times, default=None)

    @property
    def duration(self) -> float | None:
        """Seconds under way, the pauses between its attempts left out."""
        if not self.attempts:
            first, last = self.summary.first.get("time"), self.summary.last.get("time")
            return last - first if first is not None and last is not None else None
        ends = [*self.attempts[1:], len(self.history)]
        total = 0.0
        for place, end in zip(self.attempts, ends, strict=True):
            told = [event.get("time") for event in self.history[place:end]]
            times = [time for time in told if isinstance(time, (int, float))]
            times += [self.updated] if end == len(self.history) and self.updated else []
            total += max(times) - times[0] if times else 0.0
        return total

    def value(self, key: str) -> Any:
        """What a key means to --where, --sort and --columns: a column of `list`, a config key, or a
        metric's last value; min:, max: and best: before a metric name its extremes."""
        if key in COLUMNS:
            return COLUMNS[key](self)
        if key in self.config:
            return self.config[key]
        which, _, name = key.rpartition(":")
        which = which if which in ("min", "max", "best") else ""
        name = name if which else key
        series = self.summary.series.get(name, Series())
        points = {"": series.last, "min": series.min, "max": series.max, "best": self.best(name)}
        return point[1] if (point := points[which]) is not None else None

    def plain(self, columns: Iterable[str]) -> dict[str, Any]:
        """Its path, and its values in these columns."""
        return {"path": printable(str(self.path)), **{name: self.value(name) for name in columns}}

    def everything(self) -> dict[str, Any]:
        """All that is known, as plain values."""
        metrics = {}
        for key, series in sorted(self.summary.series.items()):
            points = {"last": series.last, "min": series.min, "max": series.max}
            metrics[key] = {"count": series.count, "nonfinite": series.nulls} | {
                name: point and {"step": int(point[0]), "value": point[1]}
                for name, point in points.items()
            }
        return {
            **self.plain(name for name in COLUMNS if name not in ("run", "best", "last")),
            "status": self.status and vars(self.status),
            "metrics": metrics,
            "config": self.config,
            "history": self.history,
            "environment": self.environment,
            "failure": self.failure or None,
            "damaged": self.damaged,
        }


COLUMNS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.name,
    "kind": lambda run: run.kind,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "total": lambda run: run.total_steps,
    "epoch": lambda run: run.summary.last.get("epoch"),
    "records": lambda run: run.summary.records,
    "metric": lambda run: run.metric,
    "best": lambda run: run.value(f"best:{run.metric}"),
    "last": lambda run: run.value(run.metric),
    "age": lambda run: None if run.updated is None else time.time() - run.updated,
    "duration": lambda run: run.duration,
}


def open_run(path: Path) -> Run:
    """The run in a directory, or the only one below it, or that of a file of records.

    Raises UsageError where there is none.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    below = list(find(path))
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
        run.name = printable("/".join(own[-length:]))
    return runs


def find(root: Path) -> Iterator[Run]:
    """Every run in and below a directory, by name; what a run holds is not searched. Links are
    followed, but no directory is visited twice."""
    seen = set()

    def search(path: Path, name: str) -> Iterator[Run]:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        if (run := run_at(path, name or path.name or str(path))) is not None:
            yield run
            return
        try:
            below = sorted(os.scandir(path), key=lambda one: (one.is_symlink(), one.name))
        except OSError:  # a file, or not ours to read
            return
        for one in below:
            # DirEntry.is_dir() fails for a link to itself, os.path's for nothing.
            folder = os.path.isdir(one.path) if one.is_symlink() else one.is_dir()
            if folder and not one.name.startswith("."):
                yield from search(path / one.name, f"{name}/{one.name}" if name else one.name)

    yield from search(root, "")


def run_at(path: Path, name: str) -> Run | None:
    """The run in this very directory, or of this file; None where there is none."""
    if path.name == "metrics.jsonl" and path.is_file():
        path = path.parent
    there = os.path.exists  # False also where a directory may not be read
    config, begun = path / "config.yaml", ("environment.json", "history.jsonl")
    if any(there(path / name) for name in ("status.json", "metrics.jsonl")):
        return Run(path, OURS, path / "metrics.jsonl", name)
    if (found := foreign.recognise(path)) is not None:
        return Run(path if path.is_dir() else path.parent, *found, name)
    if there(config) and any(there(path / name) for name in begun):
        return Run(path, OURS, path / "metrics.jsonl", name)
    return None


def load_summaries(runs: Sequence[Run], workers: int) -> None:
    """Have every run's summary at hand; much that is new is parsed by several processes. What stays
    in memory are a few numbers a metric: no curves."""
    new = [run for run in runs if os.path.exists(run.records)]
    new = [run for run in new if not os.path.exists(index_file(run.records))]
    if workers > 1 and sum(run.records.stat().st_size for run in new) > PARALLEL:
        kinds, files = [run.kind for run in new], [run.records for run in new]
        # Not fork: numpy has threads.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            parsed = pool.map(_summary, kinds, files, [False] * len(new))
            for run, summary in zip(new, parsed, strict=True):
                run.summary = summary
    for run in runs:
        if "summary" not in vars(run):
            run.summary = _summary(run.kind, run.records, curves=False)
    if new:
        prune()


def _summary(kind: str, records: Path, curves: bool = True) -> Summary:
    try:
        return summarize(kind, records, curves)
    except FileNotFoundError:  # nothing is recorded yet
        return Summary()
    except OSError as error:
        return Summary(damaged=[Damage(0, f"cannot be read: {error.strerror}")])


def printable(text: str) -> str:
    """A name that a terminal can show: one of a file, or of a metric, may hold anything."""
    decoded = text.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in decoded)


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
