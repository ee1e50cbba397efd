"""Records as columns: files of JSON lines parsed in chunks, in whatever state they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from launcher.telemetry.rundir import POSITION

TORN = "a torn last line"
CHUNK = 1 << 22  # bytes read at once, so that memory does not grow with the file
TOGETHER = 200  # lines parsed at once: they and their objects fit in a processor's cache

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

    def series(self, key: str, x: str = "step") -> tuple[Array, Array]:
        """A metric's steps (or another of POSITION) and its values."""
        rows, values = self.columns.get(key, (np.empty(0, int), np.empty(0)))
        return self.position[x][rows], values

    def in_order(self) -> Table:
        """Every metric by step, each step once: where one stands more than once, as after a resume
        of another program's run, the later counts."""
        columns = {}
        for key, (rows, values) in self.columns.items():
            steps = self.position["step"][rows]
            if not np.all(steps[1:] > steps[:-1]):
                # np.unique keeps the first of equals: of the reversed array, the last.
                _, first = np.unique(steps[::-1], return_index=True)
                rows, values = rows[::-1][first], values[::-1][first]
            columns[key] = rows, values
        return Table(self.position, columns, self.damaged)

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
        damaged = [damage for table in tables for damage in table.damaged]
        return cls(position, {key: _joined(found) for key, found in parts.items()}, damaged)

    @classmethod
    def build(cls, objects: Iterable[tuple[int, Any]]) -> Table:
        """Of lines by number: what was parsed, or the Damage that a line is."""
        records: list[dict[str, Any]] = []
        damaged: list[Damage] = []
        for line, found in objects:
            if isinstance(found, Damage):
                damaged.append(found)
            elif type(found.get("step")) is not int:
                damaged.append(Damage(line, "a record without a step"))
            else:
                records.append(found)
        columns = _columns(records)
        position = {name: np.full(len(records), np.nan) for name in POSITION}
        for name in POSITION:
            if name in columns:
                rows, values = columns.pop(name)
                position[name][rows] = values
        return cls(position, columns, damaged)


def _joined(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    rows, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, values


def _columns(records: Sequence[dict[str, Any]]) -> dict[str, tuple[Array, Array]]:
    """For each key the rows that name it with a number or null, and the values."""
    groups: dict[tuple[str, ...], list[int]] = {}  # records of the same keys make one matrix
    for row, record in enumerate(records):
        groups.setdefault(tuple(record), []).append(row)
    parts: dict[str, list[tuple[Array, Array]]] = {}
    for keys, places in groups.items():
        same = [records[row] for row in places]
        rows = np.array(places)
        flat = list(chain.from_iterable(map(dict.values, same)))
        if set(map(type, flat)) <= {int, float}:
            matrix = np.fromiter(flat, float, len(flat)).reshape(-1, len(keys))
            for key, column in zip(keys, matrix.T, strict=True):
                parts.setdefault(key, []).append((rows, column))
            continue
        for key in keys:
            numbers = [record[key] for record in same]
            known = [v is None or isinstance(v, (int, float)) for v in numbers]
            if any(known):
                column = np.array([v for v, k in zip(numbers, known, strict=True) if k], float)
                parts.setdefault(key, []).append((rows[known], column))
    columns = {key: found[0] for key, found in parts.items()}
    for key, found in parts.items():
        if len(found) > 1:
            rows, values = _joined(found)
            order = np.argsort(rows)
            columns[key] = rows[order], values[order]
    return columns


@dataclass(frozen=True)
class Place:
    """Where a line ends in a file, how many came before that, and what it says."""

    end: int = 0
    lines: int = 0
    last: bytes = b""

    def stands(self, path: Path) -> bool:
        """Whether the line still ends there: a file that only grew was not cut back meanwhile.
        No two records are the same, since they have a time."""
        try:
            with path.open("rb") as file:
                file.seek(self.end - len(self.last))
                return file.read(len(self.last)) == self.last
        except OSError:
            return False


def read_chunks(path: Path, start: Place, size: int = CHUNK) -> Iterator[tuple[Table, Place]]:
    """The records from a place on, and where each chunk ends. A last line without its line feed may
    be under way: it is told as torn, not consumed."""
    place = start
    with path.open("rb") as file:
        file.seek(start.end)
        while lines := file.readlines(size):
            torn = [] if lines[-1].endswith(b"\n") else [lines.pop()]
            starts = range(0, len(lines), TOGETHER)
            tables = [parse(lines[at : at + TOGETHER], place.lines + at + 1) for at in starts]
            if lines:
                end = place.end + sum(map(len, lines))
                place = Place(end, place.lines + len(lines), lines[-1])
            if torn:
                tables.append(Table.build([(0, Damage(place.lines + 1, TORN))]))
            yield Table.join(tables), place
            if torn:  # its rest, should it have come by now, is no line
                return


def parse(lines: Sequence[bytes], first: int = 1) -> Table:
    """The records of whole lines, the first of which has this number."""
    # One call for all lines is twice as fast as one a line. It is allowed where every line is an
    # object by the look of its ends, and there are as many objects as lines.
    if all(line.startswith(b"{") and line.endswith(b"}\n") for line in lines):
        try:
            records = orjson.loads(b"[%b]" % b",".join(lines))
            if len(records) == len(lines):
                return Table.build(enumerate(records, first))
        except orjson.JSONDecodeError:
            pass
    return Table.build(objects(lines, orjson.loads, first))


def objects(
    lines: Iterable[bytes], loads: Callable[[bytes], Any], first: int = 1
) -> Iterator[tuple[int, Any]]:
    """Each line's number and its object, or the Damage that it is."""
    for number, line in enumerate(lines, first):
        try:
            found = loads(line)
        except (ValueError, RecursionError) as error:
            torn = not line.endswith(b"\n")
            yield number, Damage(number, TORN if torn else f"no JSON: {error}")
            continue
        yield number, found if isinstance(found, dict) else Damage(number, "not an object")


def read_table(path: Path) -> Table:
    """All records of a file as they stand there."""
    return Table.join([table for table, _ in read_chunks(path, Place())])


def read_objects(path: Path) -> tuple[list[dict[str, Any]], list[Damage]]:
    """The objects of a small file of JSON lines, and the lines that hold none."""
    try:
        with path.open("rb") as file:
            found = [one for _, one in objects(file, orjson.loads)]
    except OSError:
        return [], []
    damaged = [one for one in found if isinstance(one, Damage)]
    return [one for one in found if not isinstance(one, Damage)], damaged
