"""Records as columns: files of JSON lines parsed in chunks, in whatever state they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

POSITION = ("step", "epoch", "samples", "time")
CHUNK = 1 << 18  # bytes parsed at once: fits in the cache, and memory does not grow with the file

Array = np.ndarray


@dataclass(frozen=True)
class Damage:
    """A line that holds no record, and why."""

    line: int  # from 1
    reason: str


@dataclass
class Table:
    """Records as arrays.

    `position` has a value a record for each of POSITION, NaN where a record has none. `columns` has
    for each metric the rows that name it, and their values: NaN for null.
    """

    position: dict[str, Array]
    columns: dict[str, tuple[Array, Array]]
    damaged: list[Damage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.position["step"])

    def latest(self, key: str) -> tuple[Array, Array]:
        """A metric's rows and values, by step. Where a step stands more than once, after a resume
        of somebody else's run, the later one counts."""
        rows, values = self.columns.get(key, (np.empty(0, int), np.empty(0)))
        steps = self.position["step"][rows]
        if increasing(steps):
            return rows, values
        # np.unique keeps the first of equals: of the reversed array, the last.
        _, first = np.unique(steps[::-1], return_index=True)
        kept = len(steps) - 1 - first
        return rows[kept], values[kept]

    def series(self, key: str, x: str = "step") -> tuple[Array, Array]:
        """A metric's steps (or another of POSITION) and values, each step once and in order."""
        rows, values = self.latest(key)
        return self.position[x][rows], values

    @classmethod
    def join(cls, tables: Sequence[Table]) -> Table:
        """The records of all tables, in this order."""
        position = {
            name: np.concatenate([np.empty(0), *(table.position[name] for table in tables)])
            for name in POSITION
        }
        parts: dict[str, list[tuple[Array, Array]]] = {}
        offset = 0
        for table in tables:
            for key, (rows, values) in table.columns.items():
                parts.setdefault(key, []).append((rows + offset, values))
            offset += len(table)
        columns = {
            key: (np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))
            for key, pairs in parts.items()
        }
        return cls(position, columns, [d for table in tables for d in table.damaged])

    @classmethod
    def build(cls, records: Sequence[dict[str, Any]], lines: Sequence[int]) -> Table:
        """Of parsed lines and their numbers; an object without a step is no record, but damage."""
        position = {name: np.full(len(records), np.nan) for name in POSITION}
        parts: dict[str, list[tuple[Array, Array]]] = {}
        for keys, rows, values in _groups(records, range(len(records))):
            for column, key in enumerate(keys):
                if key in position:
                    position[key][rows] = values[:, column]
                else:
                    parts.setdefault(key, []).append((rows, values[:, column]))
        steps = position["step"]
        good = np.isfinite(steps) & (steps == np.floor(steps))
        if not good.all():
            kept, bad = np.flatnonzero(good).tolist(), np.flatnonzero(~good).tolist()
            table = cls.build([records[i] for i in kept], [lines[i] for i in kept])
            table.damaged = [Damage(lines[i], "a record without a step") for i in bad]
            return table
        columns = {}
        for key, pairs in parts.items():
            rows, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
            if len(pairs) > 1:
                order = np.argsort(rows)
                rows, values = rows[order], values[order]
            columns[key] = rows, values
        return cls(position, columns)


def increasing(steps: Array) -> bool:
    return bool(np.all(steps[1:] > steps[:-1]))


def _groups(
    records: Sequence[dict[str, Any]], rows: Sequence[int]
) -> Iterator[tuple[tuple[str, ...], Array, Array]]:
    """Records of the same keys as one matrix each: (keys, rows, values)."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(tuple(record), []).append(place)
    for keys, places in groups.items():
        same = records if len(places) == len(records) else [records[i] for i in places]
        numbers = chain.from_iterable(map(dict.values, same))
        try:
            if "nonfinite" in keys:
                raise TypeError
            values = np.fromiter(numbers, float, len(keys) * len(places))
        except (TypeError, ValueError, OverflowError):  # a null or a text among them
            cleaned = [{k: v for k, n in r.items() if (v := _number(n)) is not None} for r in same]
            yield from _groups(cleaned, [rows[i] for i in places])
            continue
        yield keys, np.array([rows[i] for i in places]), values.reshape(-1, len(keys))


def _number(value: Any) -> float | None:
    """A number, NaN for null, None for what is no number."""
    if value is None:
        return float("nan")
    return float(value) if isinstance(value, (int, float)) else None


@dataclass(frozen=True)
class Chunk:
    """The records of a part of a file, where the part ends, and how many lines came before there.

    `open` is set where the last line is not ended by a line feed: a torn one is not consumed, since
    it may still be under way.
    """

    table: Table
    end: int
    lines: int
    open: bool = False


def read_chunks(
    path: Path, offset: int = 0, lines: int = 0, limit: int | None = None, size: int = CHUNK
) -> Iterator[Chunk]:
    """The records of a file from an offset on, where `lines` lines came before it; of a file that
    grows, up to `limit`."""
    with path.open("rb") as file:
        limit = os.fstat(file.fileno()).st_size if limit is None else limit
        file.seek(offset)
        while block := file.read(min(size, max(0, limit - file.tell()))):
            if not block.endswith(b"\n"):
                block += file.readline(limit - file.tell())
            whole, _, last = block.rpartition(b"\n")
            if whole or not last:
                whole += b"\n"
                table, count = parse(whole, lines + 1)
                offset, lines = offset + len(whole), lines + count
                yield Chunk(table, offset, lines)
            if last:
                table, _ = parse(last + b"\n", lines + 1)
                complete = len(table) == 1
                if not complete:
                    table.damaged = [Damage(lines + 1, "a torn last line")]
                end = offset + len(last) * complete
                yield Chunk(table, end, lines + complete, open=True)
                return


def parse(block: bytes, first: int = 1) -> tuple[Table, int]:
    """The records of whole lines, the first of which has this number; and how many lines."""
    count = block.count(b"\n")
    # One call for all lines is twice as fast as one a line. It is allowed where every line is an
    # object by the look of its ends, and there are as many objects as lines.
    if block.startswith(b"{") and block.endswith(b"}\n") and block.count(b"}\n{") == count - 1:
        try:
            records = orjson.loads(b"[%b]" % block[:-1].replace(b"\n", b","))
            if len(records) == count:
                return Table.build(records, range(first, first + count)), count
        except orjson.JSONDecodeError:
            pass
    records, lines, damaged = [], [], []
    for number, line in enumerate(block.split(b"\n")[:-1], first):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            damaged.append(Damage(number, f"no JSON: {error}"))
            continue
        if isinstance(record, dict):
            records.append(record)
            lines.append(number)
        else:
            damaged.append(Damage(number, "not an object"))
    table = Table.build(records, lines)
    table.damaged = sorted([*table.damaged, *damaged], key=lambda d: d.line)
    return table, count


def read_table(path: Path, limit: int | None = None, keys: Sequence[str] = ()) -> Table:
    """All records of a file, of these keys alone where some are given; an empty table where there
    is no file."""
    tables = []
    for chunk in read_chunks(path, limit=limit) if path.exists() else ():
        if keys:
            columns = chunk.table.columns
            chunk.table.columns = {key: columns[key] for key in keys if key in columns}
        tables.append(chunk.table)
    return Table.join(tables)


def read_objects(path: Path) -> tuple[list[dict[str, Any]], list[Damage]]:
    """The objects of a small file of JSON lines as they stand, and the lines that hold none."""
    found, damaged = [], []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [], []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            damaged.append(Damage(number, f"no JSON: {error}"))
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            damaged.append(Damage(number, "not an object"))
    return found, damaged
