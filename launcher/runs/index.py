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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson

from launcher.runs.records import (
    POSITION,
    Array,
    Damage,
    Table,
    increasing,
    read_chunks,
    read_table,
)

VERSION = 1
BUCKETS = 512  # most buckets of a curve
BATCH = 32  # chunks that are added at once
TOLD = 100  # most damaged lines that are named
PROBE = 1 << 12  # bytes before the end, and at the start, that must be as they were
UNUSED_S = 90 * 86400.0
# Columns of a curve's buckets: where it begins and ends, and what a line chart needs of its values.
BUCKET = ("step", "last_step", "first", "min", "max", "last")


class Repeats(Exception):
    """A metric's steps go back: a summary cannot take back what it has counted."""


@dataclass
class Series:
    """A metric in short: how often, the last, least and greatest value with their steps."""

    count: int = 0  # finite values
    nulls: int = 0
    last: tuple[float, float | None] | None = None
    min: tuple[float, float] | None = None
    max: tuple[float, float] | None = None
    stride: int = 1  # values a bucket
    curve: Array = field(default_factory=lambda: np.empty((0, len(BUCKET))))

    def extend(self, steps: Array, values: Array) -> None:
        """Count further values. The outcome depends on the sequence of values alone, not on the
        parts that it came in."""
        if not len(steps):
            return
        if (self.last is not None and steps[0] <= self.last[0]) or not increasing(steps):
            raise Repeats
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
        while -(-(self.count + len(values)) // self.stride) > BUCKETS:
            self.curve = _reduce(self.curve, np.arange(0, len(self.curve), 2))
            self.stride *= 2
        bucket = (self.count + np.arange(len(values))) // self.stride
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        new = _reduce(np.column_stack([steps, steps, values, values, values, values]), starts)
        if len(self.curve) > bucket[0]:  # the last bucket had room left
            new[:1] = _reduce(np.concatenate([self.curve[-1:], new[:1]]), np.array([0]))
            self.curve = self.curve[:-1]
        self.curve = np.concatenate([self.curve, new])
        self.count += len(values)


def _reduce(rows: Array, starts: Array) -> Array:
    """One bucket of the rows from each start to the next."""
    if not len(rows):
        return rows
    ends = np.append(starts[1:], len(rows)) - 1
    return np.column_stack(
        [
            rows[starts, 0],
            rows[ends, 1],
            rows[starts, 2],
            np.minimum.reduceat(rows[:, 3], starts),
            np.maximum.reduceat(rows[:, 4], starts),
            rows[ends, 5],
        ]
    )


@dataclass
class Summary:
    """A file of records in short. `first` and `last` are positions of records."""

    records: int = 0
    first: dict[str, float | None] = field(default_factory=dict)
    last: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    damaged: list[Damage] = field(default_factory=list)
    damaged_count: int = 0
    repeats: bool = False  # steps stand more than once

    def add(self, table: Table) -> None:
        self.damaged_count += len(table.damaged)
        self.damaged = (self.damaged + table.damaged)[:TOLD]
        if not len(table):
            return
        for key, (rows, values) in table.columns.items():
            steps, values = (
                table.series(key) if self.repeats else (table.position["step"][rows], values)
            )
            self.series.setdefault(key, Series()).extend(steps, values)
        self.first = self.first or _position(table, 0)
        self.last = _position(table, -1)
        self.records += len(table)

    @classmethod
    def of(cls, table: Table) -> Summary:
        """Of all records of a run at once, whatever order they are in."""
        try:
            summary = cls()
            summary.add(table)
        except Repeats:
            summary = cls(repeats=True)
            summary.add(table)
        return summary


def _position(table: Table, row: int) -> dict[str, float | None]:
    values = {name: float(table.position[name][row]) for name in POSITION}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


@dataclass
class Mark:
    """How far a file was read, and what it was then."""

    inode: int = 0
    mtime_ns: int = 0
    end: int = 0
    lines: int = 0
    head: int = 0  # checksums of the bytes at the start, and before the end
    tail: int = 0

    def same(self, path: Path) -> bool:
        """Whether nothing has happened to the file since it was read to its end."""
        return state(path) == (self.inode, self.mtime_ns, self.end)

    def grown(self, path: Path) -> bool:
        """Whether what was read still stands there, and more after it."""
        inode, _, size = state(path)
        return (
            0 < self.end < size
            and inode == self.inode
            and _checksums(path, self.end) == (self.head, self.tail)
        )


def state(path: Path) -> tuple[int, int, int]:
    """Inode, time of change and size of a file, or of the event files in a directory."""
    stat = path.stat()
    if not path.is_dir():
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    stats = [file.stat() for file in path.glob("*tfevents*")]
    return (
        stat.st_ino,
        max((s.st_mtime_ns for s in stats), default=0),
        sum(s.st_size for s in stats),
    )


def _checksums(path: Path, end: int) -> tuple[int, int]:
    if path.is_dir():
        return 0, 0
    with path.open("rb") as file:
        head = zlib.crc32(file.read(min(PROBE, end)))
        file.seek(max(0, end - PROBE))
        return head, zlib.crc32(file.read(min(PROBE, end)))


def cache_directory() -> Path:
    """Where indexes are kept: $XDG_CACHE_HOME/launcher/runs, or ~/.cache/launcher/runs."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path there is to be ignored.
    root = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    return root / "launcher" / "runs"


class Index:
    """The summary of one file of records, kept between calls."""

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        self.file = (cache or cache_directory()) / name

    def kept(self) -> Summary | None:
        """The summary without its curves, where the file is as it was when they were made."""
        kept = self._load(curves=False)
        return kept[1] if kept is not None and kept[0].same(self.path) else None

    def summary(self, whole: Callable[[], Table] | None = None) -> Summary:
        """The summary of the file as it stands.

        `whole` reads a file that is not of JSON lines in the launcher's format.
        """
        kept = self._load(curves=True)
        if kept is not None and kept[0].same(self.path):
            return kept[1]
        if whole is None:
            if kept is not None and not kept[1].repeats and kept[0].grown(self.path):
                with contextlib.suppress(Repeats):
                    return self._read(*kept)
            with contextlib.suppress(Repeats):
                return self._read(Mark(), Summary())
        found = state(self.path)
        summary = Summary.of(whole() if whole is not None else read_table(self.path, found[2]))
        self._save(found, found[2], 0, summary)
        return summary

    def _read(self, mark: Mark, summary: Summary) -> Summary:
        """Go on from a mark. What comes after the last line feed is seen, but not kept."""
        found = state(self.path)  # before: what is appended meanwhile belongs to the next time
        end, lines, last = mark.end, mark.lines, None
        batch: list[Table] = []  # to add many records at once is many times as fast
        for chunk in read_chunks(self.path, mark.end, mark.lines, found[2]):
            if chunk.open:
                last = chunk.table
                continue
            batch.append(chunk.table)
            end, lines = chunk.end, chunk.lines
            if len(batch) == BATCH:
                summary.add(Table.join(batch))
                batch.clear()
        summary.add(Table.join(batch))
        self._save(found, end, lines, summary)
        if last is not None:
            summary.add(last)
        return summary

    # The file: a checksum, a line of JSON, and the curves as one block of doubles.

    def _load(self, curves: bool) -> tuple[Mark, Summary] | None:
        """What is kept; None where there is nothing, or nothing whole."""
        try:
            with self.file.open("rb") as file:
                checksum, header = file.readline(), file.readline()
                if int(checksum, 16) != zlib.crc32(header):
                    return None
                kept = orjson.loads(header)
                if kept["version"] != VERSION or kept["path"] != str(self.path.resolve()):
                    return None
                block = file.read() if curves else b""
        except (OSError, ValueError):
            return None
        if curves and zlib.crc32(block) != kept["block"]:
            return None
        rows = np.frombuffer(block).reshape(-1, len(BUCKET))
        series, start = {}, 0
        for key, (length, fields) in kept["series"].items():
            pairs = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
            series[key] = Series(**{**fields, **pairs})
            if curves:
                series[key].curve = rows[start : start + length]
            start += length
        damaged = [Damage(**d) for d in kept["summary"].pop("damaged")]
        summary = Summary(**kept["summary"], series=series, damaged=damaged)
        return Mark(**kept["mark"]), summary

    def _save(self, found: tuple[int, int, int], end: int, lines: int, summary: Summary) -> None:
        """Keep it; where that is not possible, the next call parses the file once more."""
        mark = Mark(found[0], found[1], end, lines, *_checksums(self.path, end))
        block = b"".join(series.curve.tobytes() for series in summary.series.values())
        header = {
            "version": VERSION,
            "path": str(self.path.resolve()),
            "mark": asdict(mark),
            "summary": {
                **{k: v for k, v in vars(summary).items() if k not in ("series", "damaged")},
                "damaged": [asdict(damage) for damage in summary.damaged],
            },
            "series": {
                key: (len(s.curve), {k: v for k, v in vars(s).items() if k != "curve"})
                for key, s in summary.series.items()
            },
            "block": zlib.crc32(block),
        }
        line = orjson.dumps(header) + b"\n"
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"%08x\n%b%b" % (zlib.crc32(line), line, block))
            temporary.replace(self.file)
            return
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def prune(cache: Path | None = None) -> None:
    """Remove indexes that were not written for UNUSED_S."""
    with contextlib.suppress(OSError):
        for path in (cache or cache_directory()).iterdir():
            if time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()
