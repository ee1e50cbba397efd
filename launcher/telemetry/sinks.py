"""What a sink is, metrics.jsonl, and a file that grows by whole pieces. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonlines

if TYPE_CHECKING:
    from launcher.telemetry.media import Media

# One metrics record: step, epoch, samples, time, and a number for each metric.
Record = dict[str, Any]


class Sink:
    """Where records and media go. The writing thread alone calls it."""

    name = ""  # for people
    essential = False  # whether a checkpoint needs all records in it

    def write(self, items: Sequence[Record | Media]) -> None:
        """Write all of these. Raises OSError where none could be written: they come again."""
        raise NotImplementedError

    def close(self, completed: bool) -> None:
        """End, after all that was written; `completed`: so is the run."""


class JsonLines(Sink):
    """metrics.jsonl: a line a record."""

    essential = True

    def __init__(self, path: Path) -> None:
        self.name, self.file = str(path), AppendFile(path)

    def write(self, items: Sequence[Record | Media]) -> None:
        self.file.append(lines(strict(item) for item in items if isinstance(item, dict)))

    def close(self, completed: bool) -> None:
        self.file.close()


def lines(values: Iterable[Mapping[str, Any]], default: Any = float) -> bytes:
    """Objects as JSON lines; `default` makes something of what JSON has no form for."""
    dumps = partial(json.dumps, allow_nan=False, ensure_ascii=False, default=default)
    piece = io.BytesIO()
    jsonlines.Writer(piece, dumps=dumps).write_all(values)
    return piece.getvalue()


def strict(record: Mapping[str, Any]) -> Record:
    """The record as strict JSON has it: NaN and infinity as null, their keys under `nonfinite`."""
    bad = [key for key, value in record.items() if not math.isfinite(value)]
    return {**record, **dict.fromkeys(bad), "nonfinite": bad} if bad else dict(record)


class AppendFile:
    """Each piece is in the file as a whole, or not at all. It is opened with the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: io.FileIO | None = None
        self.length = 0  # of whole pieces in the file

    def append(self, piece: bytes) -> None:
        """Write a piece. Raises OSError where that is not possible; no part of it is left then."""
        if not piece:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what failed must not be written later by itself, after a part of it.
            self.file = io.FileIO(self.path, "ab")
            self.length = self.file.seek(0, os.SEEK_END)
        try:
            self._cut()  # what could not be cut off when it failed
            self._write(self.file, piece)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self.length += len(piece)

    def _write(self, file: io.FileIO, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            written = file.write(rest)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = rest[written:]

    def _cut(self) -> None:
        assert self.file is not None
        if self.file.seek(0, os.SEEK_END) > self.length:
            self.file.truncate(self.length)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
