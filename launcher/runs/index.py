"""What is known of a file of records without parsing it again: a summary of fixed size.

It is kept in the user's cache directory, never in a run directory. Where the file has grown, only
what is new is parsed; where it is another file, or was cut or changed, the whole of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from launcher.runs import foreign
from launcher.runs.records import Array, Damage, Place, Table, read_chunks, read_table
from launcher.telemetry.rundir import POSITION

VERSION = 2  # of the index: in its file's name, so that another version finds none
BUCKETS = 288  # most of a curve; half of them are twice as many as a terminal draws
TOLD = 100  # most damaged lines that are named
UNUSED_S = 90 * 86400.0
OURS = "launcher"


class StepsGoBack(Exception):
    """A metric's steps do: a summary cannot take back what it has counted."""


@dataclass
class Series:
    """A metric in short: how many values, the last, least and greatest with their steps, and a
    curve: step, least and greatest value of every `stride` values."""

    count: int = 0  # finite values
    nulls: int = 0
    last: tuple[float, float | None] | None = None
    min: tuple[float, float] | None = None
    max: tuple[float, float] | None = None
    stride: int = 1
    curve: Array = field(default_factory=lambda: np.empty((0, 3)))

    def extend(self, steps: Array, values: Array) -> None:
        """Count further values. The outcome depends on the sequence of values alone, not on the
        parts that it came in."""
        if not len(steps):
            return
        if np.any(np.diff(steps, prepend=self.last[0] if self.last else -np.inf) <= 0):
            raise StepsGoBack
        finite = np.isfinite(values)
        self.last = (float(steps[-1]), float(values[-1]) if finite[-1] else None)
        self.nulls += int(len(values) - finite.sum())
        steps, values = steps[finite], values[finite]
        if not len(steps):
            return
        least, most = int(np.argmin(values)), int(np.argmax(values))
        if self.min is None or values[least] < self.min[1]:
            self.min = (float(steps[least]), float(values[least]))
        if self.max is None or values[most] > self.max[1]:
            self.max = (float(steps[most]), float(values[most]))
        old = np.arange(len(self.curve))
        new = self.count + np.arange(len(values))
        self.count += len(values)
        while self.count > BUCKETS * self.stride:
            self.stride, old = 2 * self.stride, old // 2
        bucket = np.concatenate([old, new // self.stride])
        points = np.concatenate([self.curve, np.column_stack([steps, values, values])])
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        low = np.minimum.reduceat(points[:, 1], starts)
        high = np.maximum.reduceat(points[:, 2], starts)
        self.curve = np.column_stack([points[starts, 0], low, high])


@dataclass
class Summary:
    """A file of records in short. `first` and `last` are positions of records."""

    records: int = 0
    first: dict[str, float | None] = field(default_factory=dict)
    last: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    damaged: list[Damage] = field(default_factory=list)  # the first TOLD lines

    def add(self, table: Table) -> None:
        self.damaged = (self.damaged + table.damaged)[:TOLD]
        if not len(table):
            return
        for key in table.columns:
            self.series.setdefault(key, Series()).extend(*table.series(key))
        positions = [
            {name: _finite(table.position[name][row]) for name in POSITION} for row in (0, -1)
        ]
        self.first, self.last = self.first or positions[0], positions[1]
        self.records += len(table)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass
class Kept:
    """A summary, and of what: the file as it was (`state`), read up to a place."""

    state: tuple[int, ...] = ()
    place: Place = field(default_factory=Place)
    summary: Summary = field(default_factory=Summary)

    def has_grown(self, path: Path, now: tuple[int, ...]) -> bool:
        """Whether all that was read still stands in the file, with more after it."""
        same = self.state[0] == now[0] and self.place.end > 0
        return same and self.state[-1] < now[-1] and self.place.stands(path)

    def grow(self, path: Path, now: tuple[int, ...]) -> None:
        """Add what came after the place."""
        # What is torn may be whole by now.
        told = self.summary.damaged
        self.summary.damaged = [damage for damage in told if damage.line <= self.place.lines]
        for table, place in read_chunks(path, self.place):
            self.summary.add(table)
            self.place = place
        self.state = now


def read(kind: str, path: Path) -> Table:
    """All records of a run."""
    return read_table(path) if kind == OURS else foreign.read(kind, path)


def summarize(kind: str, path: Path, curves: bool = True) -> Summary:
    """The summary of a run's records as they stand."""
    now = _state(path)  # before reading: after what is appended meanwhile it is another
    file = index_file(path)
    kept = _load(file)
    if kept is None or kept.state != now:
        try:
            if kind != OURS:
                raise StepsGoBack
            if kept is None or not kept.has_grown(path, now):
                kept = Kept()
            kept.grow(path, now)
        except StepsGoBack:
            kept = Kept(now)
            kept.summary.add(read(kind, path).in_order())
        _save(file, kept)
    if not curves:
        for series in kept.summary.series.values():
            series.curve = series.curve[:0]
    return kept.summary


def _state(path: Path) -> tuple[int, ...]:
    """Inode, time of change and size of a file, or of the event files in a directory."""
    stat = path.stat()
    stats = [file.stat() for file in path.glob("*tfevents*")] if path.is_dir() else [stat]
    changed = max((one.st_mtime_ns for one in stats), default=0)
    return stat.st_ino, changed, sum(one.st_size for one in stats)


# The index: a checksum and a line of JSON.


def cache_directory() -> Path:
    """Where indexes are kept: $XDG_CACHE_HOME/launcher/runs, or ~/.cache/launcher/runs."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path there is to be ignored.
    root = base if base.startswith("/") else os.path.expanduser("~/.cache")
    # A user without a home has no cache: nothing can be made there.
    return Path(root if root.startswith("/") else os.devnull) / "launcher" / "runs"


def index_file(path: Path) -> Path:
    """Where the index of a file of records is, or will be."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_directory() / f"{name}.{VERSION}"


def _load(file: Path) -> Kept | None:
    """What is kept; None where there is nothing, or nothing whole."""
    try:
        checksum, _, line = file.read_bytes().partition(b"\n")
        if int(checksum, 16) != zlib.crc32(line):
            return None
    except (OSError, ValueError):
        return None
    found = orjson.loads(line)
    summary = found["summary"]
    for key, fields in summary["series"].items():
        pairs = {name: tuple(v) for name in ("last", "min", "max") if (v := fields[name])}
        curve = np.array(fields["curve"], float).reshape(-1, 3)
        summary["series"][key] = Series(**{**fields, **pairs, "curve": curve})
    summary["damaged"] = [Damage(**damage) for damage in summary["damaged"]]
    place = Place(found["end"], found["lines"], found["last"].encode())
    return Kept(tuple(found["state"]), place, Summary(**summary))


def _save(file: Path, kept: Kept) -> None:
    """Keep it; where that is not possible, the next call parses the file once more."""
    place, last = kept.place, kept.place.last.decode(errors="replace")
    found = {"state": kept.state, "end": place.end, "lines": place.lines, "last": last}
    line = orjson.dumps({**found, "summary": kept.summary}, option=orjson.OPT_SERIALIZE_NUMPY)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"%08x\n%b" % (zlib.crc32(line), line))
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def prune() -> None:
    """Remove indexes that were not written for UNUSED_S."""
    with contextlib.suppress(OSError):
        for path in cache_directory().iterdir():
            if time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()
