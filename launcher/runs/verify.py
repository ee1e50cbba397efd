"""Whether a run directory keeps its promises: the list of where it does not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint
from launcher.config.units import parse_duration
from launcher.errors import UsageError
from launcher.runs import foreign
from launcher.runs.records import POSITION, Array, Table
from launcher.runs.run import Run
from launcher.runs.status import read_status

MOST = 20  # findings of one kind that are named


@dataclass(frozen=True)
class Finding:
    """What is wrong, and in which file (with its line, where it has lines)."""

    where: str
    what: str


def verify(run: Run) -> list[Finding]:
    """Everything that is wrong with a run of ours, however it ended or while it is under way.

    Raises UsageError for another program's run: nothing was promised there.
    """
    if not run.ours:
        raise UsageError(f"{run.path} is {run.kind}'s: only runs of the launcher can be verified")
    table = run.table()
    checks = [
        _lines(run.records, _flat),
        _lines(run.directory.history, lambda event: []),
        _repeats(table),
        _missing(run, table),
        _tensorboard(run, table),
        _checkpoints(run, table),
        _status(run, table),
    ]
    return [finding for check in checks for finding in _limited(check)]


def _limited(findings: Iterable[Finding]) -> list[Finding]:
    found = list(findings)
    more = [Finding(found[-1].where, f"and {len(found) - MOST} more")] if len(found) > MOST else []
    return found[:MOST] + more


def _lines(path: Path, check: Any) -> Iterator[Finding]:
    """Strict JSON, an object a line, and what `check` says of each."""
    if not path.exists():
        yield Finding(path.name, "is missing")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path.name}:{number}"
            if not line.endswith(b"\n"):
                yield Finding(where, "a torn last line")
            try:
                value = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once)
            except ValueError as error:
                yield Finding(where, f"not strict JSON: {error}")
                continue
            for what in check(value) if isinstance(value, dict) else ["not an object"]:
                yield Finding(where, what)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _flat(record: dict[str, Any]) -> Iterator[str]:
    """A record is a position, numbers, and nulls that `nonfinite` names."""
    for name in POSITION:
        if type(record.get(name)) is not int and (
            name != "time" or type(record.get(name)) is not float
        ):
            yield f"{name} is {record.get(name)!r}"
    values = {k: v for k, v in record.items() if k not in (*POSITION, "nonfinite")}
    nulls, named = [k for k, v in values.items() if v is None], record.get("nonfinite", [])
    if not isinstance(named, list) or sorted(map(str, named)) != sorted(nulls):
        yield f"null are {nulls}, but nonfinite names {named}"
    for key, value in values.items():
        if value is not None and type(value) not in (int, float):
            yield f"{key} is {value!r}, no number"


def _repeats(table: Table) -> Iterator[Finding]:
    steps = table.position["step"]
    for place in np.flatnonzero(np.diff(steps) < 0):
        told = f"step {steps[place + 1]:.0f} after step {steps[place]:.0f}"
        yield Finding("metrics.jsonl", told)
    twice: dict[float, list[str]] = {}
    for key, (rows, _) in table.columns.items():
        found, counts = np.unique(steps[rows], return_counts=True)
        for step in found[counts > 1]:
            twice.setdefault(step, []).append(key)
    for step, keys in sorted(twice.items()):
        yield Finding("metrics.jsonl", f"step {step:.0f} stands twice for {', '.join(keys)}")


def _missing(run: Run, table: Table) -> Iterator[Finding]:
    """Records that were due and are not there, and keys that a record lacks.

    The period of the last attempt is in config.yaml. A resume may change it, so earlier ones are
    held to the distance that most of their own records keep.
    """
    for prefix, name in (("train/", "LOG.EVERY"), ("val/", "EVAL.EVERY")):
        columns = {key: rows for key, (rows, _) in table.columns.items() if key.startswith(prefix)}
        mine = np.unique(np.concatenate([np.empty(0, int), *columns.values()]))
        for key, rows in columns.items():
            if 0.9 * len(mine) <= len(rows) < len(mine):  # not one that comes now and then
                for step in table.position["step"][np.setdiff1d(mine, rows)]:
                    yield Finding("metrics.jsonl", f"no {key} at step {step:.0f}")
        try:
            period = parse_duration(str(run.config.get(name, "")))
        except ValueError:
            continue
        if period is None or period.unit == "s":
            continue
        unit = "epoch" if period.unit == "ep" else "step"
        there = np.unique(table.position[unit][mine])
        parts = _attempts(run, table, unit)
        for start, end in parts:
            inside = there[(there > start) & (there <= end)]
            amount = int(period.amount) if (start, end) == parts[-1] else _usual(inside)
            due = np.arange(start - start % amount + amount, end + 1, amount) if amount else there
            for place in np.setdiff1d(due, there):
                yield Finding("metrics.jsonl", f"no {prefix}* record at {unit} {place:.0f}")


def _attempts(run: Run, table: Table, unit: str) -> list[tuple[int, int]]:
    """Where each attempt began, and where the next one or the last record took over."""
    starts: list[int] = []
    for event in run.history:
        if event.get("event") in ("start", "resume") and isinstance(event.get("step"), int):
            before = table.position[unit][table.position["step"] <= event["step"]]
            at = event["step"] if unit == "step" else int(np.nanmax(before, initial=0))
            starts = [start for start in starts if start < at] + [at]
    end = int(np.nanmax(table.position[unit], initial=0))
    return list(zip(starts or [0], [*starts[1:], end], strict=True))


def _usual(places: Array) -> int:
    """The most common distance, 0 where there are too few to tell."""
    gaps = Counter(int(b - a) for a, b in pairwise(places))
    return gaps.most_common(1)[0][0] if len(places) > 3 else 0


def _tensorboard(run: Run, table: Table) -> Iterator[Finding]:
    """TensorBoard's scalars are those of the JSON lines, rounded to single precision."""
    directory = run.directory.tensorboard
    if not directory.is_dir():
        if run.config.get("LOG.TENSORBOARD", False) and table.columns:
            yield Finding("tensorboard", "is missing")
        return
    events = foreign.scalars(directory)
    # What a run under way, or killed, has not flushed yet is not missing.
    ended = run.state not in ("running", "lost", "?")
    flushed = max((steps.max() for steps, _, _ in events.values() if len(steps)), default=0)
    lost: dict[float, list[str]] = {}  # of either side: step -> keys
    extra: dict[float, list[str]] = {}
    for key in table.columns:
        steps, values = table.series(key)
        at, shown, _ = events.get(key, (np.empty(0), np.empty(0), None))
        every, counts = np.unique(at, return_counts=True)
        for step in every[counts > 1]:
            yield Finding("tensorboard", f"{key} stands twice at step {step:.0f}")
        for step in np.setdiff1d(steps, at):
            if ended or step < flushed:
                lost.setdefault(step, []).append(key)
        for step in np.setdiff1d(at, steps):
            if ended or step < steps.max():
                extra.setdefault(step, []).append(key)
        _, ours, theirs = np.intersect1d(steps, at, return_indices=True)
        with np.errstate(over="ignore"):
            same = values[ours].astype(np.float32) == shown[theirs].astype(np.float32)
        same |= np.isnan(values[ours]) & ~np.isfinite(shown[theirs])  # null is infinity as well
        for place in np.flatnonzero(~same):
            told = f"{shown[theirs][place]:.9g}, in metrics.jsonl {values[ours][place]:.9g}"
            yield Finding("tensorboard", f"{key} at step {steps[ours][place]:.0f} is {told}")
    for step, keys in sorted(lost.items()):
        yield Finding("tensorboard", f"no {', '.join(keys)} at step {step:.0f}")
    for step, keys in sorted(extra.items()):
        told = f"no {', '.join(keys)} at step {step:.0f}, but TensorBoard has it"
        yield Finding("metrics.jsonl", told)


def _checkpoints(run: Run, table: Table) -> Iterator[Finding]:
    """Files are as their manifest says, and its metrics as they were recorded."""
    store = CheckpointStore(run.directory.checkpoints)
    for step in store.steps():
        where = f"checkpoints/{store.path(step).name}"
        try:
            manifest = store.verify(step)
        except DamagedCheckpoint as error:
            if store.path(step).exists():  # a run under way drops old ones
                yield Finding(where, str(error))
            continue
        for key, value in manifest.get("metrics", {}).items():
            steps, values = table.series(key)
            recorded = [None if v != v else v for v in values[steps == step].tolist()]
            if key != "nonfinite" and recorded != [value]:
                yield Finding(where, f"{key} is {value!r}, in metrics.jsonl {recorded}")


def _status(run: Run, table: Table) -> Iterator[Finding]:
    """What status.json says is what happened."""
    for path in (run.directory.environment, run.directory.failure):
        try:
            if path.exists():
                json.loads(path.read_bytes(), parse_constant=_refuse)
        except ValueError as error:
            yield Finding(path.name, f"not strict JSON: {error}")
    if not run.config:
        yield Finding("config.yaml", "cannot be read")
    # Saves may be told of after the end, by the thread that writes them.
    turns = [event for event in run.history if event.get("event") != "checkpoint"]
    if not turns or turns[0].get("event") != "start":
        yield Finding("history.jsonl", "does not begin with a start")
    try:
        status = read_status(run.path)
    except UsageError as error:
        yield Finding("status.json", str(error))
        return
    ends = {"completed": "finish", "stopped": "stop", "failed": "failure"}
    if (wanted := ends.get(status.state)) is None:
        return
    last = turns[-1] if turns else {}
    if (last.get("event"), last.get("step")) != (wanted, status.step):
        told = f"{status.state} at step {status.step}; the end of history.jsonl is"
        yield Finding("status.json", f"{told} {last.get('event')} at step {last.get('step')}")
    recorded = int(max(table.position["step"], default=0))
    completed = status.state == "completed"
    if recorded > status.step or (completed and recorded < status.step):
        yield Finding("status.json", f"says step {status.step}, the records {recorded}")
    if completed and status.step not in CheckpointStore(run.directory.checkpoints).steps():
        yield Finding("checkpoints", f"none of the last step, {status.step}")
