"""Whether a run directory keeps its promises: the list of where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint
from launcher.config.checks import recorded_as
from launcher.config.units import parse_duration
from launcher.errors import UsageError
from launcher.runs import foreign
from launcher.runs.records import TORN, Array, Damage, Table, objects
from launcher.runs.run import Run
from launcher.runs.status import read_status
from launcher.telemetry.rundir import POSITION

ENDS = {"completed": "finish", "stopped": "stop", "failed": "failure"}  # state -> event
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
    checks = (
        _lines(run, run.records, _flat),
        _lines(run, run.directory.history, lambda event: []),
        _repeats(table),
        _missing(run, table),
        _tensorboard(run, table),
        _checkpoints(run, table),
        _status(run, table),
    )
    found: list[Finding] = []
    for check in checks:
        first = list(islice(check, MOST))
        more = sum(1 for _ in check)
        found += first + ([Finding(first[-1].where, f"and {more} more")] if more else [])
    return found


def _lines(run: Run, path: Path, check: Callable[[Any], Iterable[str]]) -> Iterator[Finding]:
    """Strict JSON, an object a line, and what `check` says of each."""
    if not path.exists():
        yield Finding(path.name, "is missing")
        return
    with path.open("rb") as file:
        for number, found in objects(file, _strict):
            torn = found == Damage(number, TORN)
            if torn and run.state == "running":  # the line is just being written
                continue
            for what in [found.reason] if isinstance(found, Damage) else check(found):
                yield Finding(f"{path.name}:{number}", what)


def _strict(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        raise ValueError("not ended")
    return json.loads(line, parse_constant=_refuse, object_pairs_hook=_once)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return dict(pairs)


def _flat(record: dict[str, Any]) -> Iterator[str]:
    """A record is a position, numbers, and nulls that `nonfinite` names."""
    for name in POSITION:
        kinds = (int, float) if name == "time" else (int,)
        if type(record.get(name)) not in kinds:
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
    twice = [(step, key) for key in table.columns for step in _twice(table.series(key)[0])]
    for step, keys in _by_step(twice):
        yield Finding("metrics.jsonl", f"step {step:.0f} stands twice for {keys}")


def _twice(steps: Array) -> Array:
    found, counts = np.unique(steps, return_counts=True)
    return found[counts > 1]


def _by_step(found: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """A step and its keys, for each step."""
    for step, pairs in groupby(sorted(found, key=itemgetter(0)), key=itemgetter(0)):
        keys = [key for _, key in pairs]
        yield step, ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _missing(run: Run, table: Table) -> Iterator[Finding]:
    """Records that were due and are not there, and keys that a record lacks.

    The period of the last attempt is in config.yaml. A resume may change it, so earlier ones are
    held to the distance that most of their own records keep.
    """
    splits = run.config.get("EVAL.SPLITS", ["val"])
    evaluated = [f"{recorded_as(split)}/" for split in splits]
    for prefix, name in (("train/", "LOG.EVERY"), *((e, "EVAL.EVERY") for e in evaluated)):
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
        for part, (start, end) in enumerate(parts, 1):
            inside = there[(there > start) & (there <= end)]
            gaps = np.diff(inside).astype(int).tolist()
            every = int(period.amount) if part == len(parts) else mode(gaps or [0])
            if not every:  # an attempt too short to tell
                continue
            # The places that were due and are there, between one before and one after all of them.
            due = inside[inside % every == 0]
            edges = [start - start % every, *due.tolist(), end - end % every + every]
            for before, after in pairwise(edges):
                if after - before > every:
                    last = f" to {after - every:.0f}" if after - before > 2 * every else ""
                    told = f"no {prefix}* record at {unit} {before + every:.0f}{last}"
                    yield Finding("metrics.jsonl", told)


def _attempts(run: Run, table: Table, unit: str) -> list[tuple[int, int]]:
    """Where each attempt began, and where the next one or the last record took over."""
    starts: list[int] = []
    at, end = table.position[unit], np.nanmax(table.position[unit], initial=0)
    for step in (run.history[place].get("step") for place in run.attempts):
        if isinstance(step, int):
            before = at[table.position["step"] <= step]
            start = step if unit == "step" else int(np.nanmax(before, initial=0))
            starts = [earlier for earlier in starts if earlier < start] + [start]
    return list(zip(starts or [0], [*starts[1:], int(end)], strict=True))


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
    lost: list[tuple[float, str]] = []
    extra: list[tuple[float, str]] = []
    for key in table.columns:
        steps, values = table.series(key)
        at, shown, _ = events.get(key, (np.empty(0), np.empty(0), None))
        for step in _twice(at):
            yield Finding("tensorboard", f"{key} stands twice at step {step:.0f}")
        missing, more = np.setdiff1d(steps, at), np.setdiff1d(at, steps)
        lost += [(step, key) for step in missing if ended or step < flushed]
        extra += [(step, key) for step in more if ended or step < steps.max()]
        _, ours, theirs = np.intersect1d(steps, at, return_indices=True)
        with np.errstate(over="ignore"):
            same = values[ours].astype(np.float32) == shown[theirs].astype(np.float32)
        same |= np.isnan(values[ours]) & ~np.isfinite(shown[theirs])  # null is infinity as well
        for place in np.flatnonzero(~same):
            told = f"{shown[theirs][place]:.9g}, in metrics.jsonl {values[ours][place]:.9g}"
            yield Finding("tensorboard", f"{key} at step {steps[ours][place]:.0f} is {told}")
    for step, keys in _by_step(lost):
        yield Finding("tensorboard", f"no {keys} at step {step:.0f}")
    for step, keys in _by_step(extra):
        told = f"no {keys} at step {step:.0f}, but TensorBoard has it"
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
    # Saves, and sinks that failed, may be told of after the end, by the thread that writes them.
    turns = [e for e in run.history if e.get("event") in ("start", "resume", *ENDS.values())]
    if not turns or turns[0].get("event") != "start":
        yield Finding("history.jsonl", "does not begin with a start")
    try:
        status = read_status(run.path)
    except UsageError as error:
        yield Finding("status.json", str(error))
        return
    if (wanted := ENDS.get(status.state)) is None:
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
