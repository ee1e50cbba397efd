"""A file that grows by whole pieces, also on a disk that is full at times."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from io import FileIO
from pathlib import Path

# What may wait for a disk that takes nothing; beyond that the newest is lost.
LIMIT = 256 << 20
# Written at once: each try to write to a full disk copies no more.
PART = 1 << 20


class AppendFile:
    """Pieces wait in memory until `flush` writes them; one that fails leaves no part of a piece,
    and the next one tries again. The file is opened at the first flush."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = path, limit
        self.waiting: deque[bytearray] = deque()  # whole pieces, about PART together in each
        self.lost = 0  # pieces
        self.file: FileIO | None = None
        self.length = 0  # of whole pieces in the file

    def add(self, piece: bytes) -> None:
        if sum(map(len, self.waiting)) + len(piece) > self.limit:
            self.lost += 1
        elif self.waiting and len(self.waiting[-1]) < PART:
            self.waiting[-1] += piece
        else:
            self.waiting.append(bytearray(piece))

    def flush(self) -> None:
        """Write what waits. Raises OSError where that is not possible now, or pieces were lost."""
        if self.waiting and self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what failed must not be written later by itself, after a part of it.
            self.file = FileIO(self.path, "ab")
            self.length = self.file.seek(0, os.SEEK_END)
        while self.waiting:
            assert self.file is not None
            data = bytes(self.waiting[0])
            try:
                self._write(self.file, data)
            except OSError:
                self._mend()
                raise
            self.length += len(data)
            self.waiting.popleft()
        if self.lost:
            raise OSError(errno.ENOBUFS, f"{self.lost} records were lost: too much waited")

    def _write(self, file: FileIO, data: bytes) -> None:
        self._mend()  # what could not be cut off when it failed
        file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        while rest:
            written = file.write(rest)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = rest[written:]

    def _mend(self) -> None:
        assert self.file is not None
        with contextlib.suppress(OSError):
            if self.file.seek(0, os.SEEK_END) > self.length:
                self.file.truncate(self.length)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            if self.file is not None:
                self.file.close()


def append_line(path: Path, line: str) -> None:
    """Append one line, or nothing of it: OSError then."""
    file = AppendFile(path)
    file.add(line.encode() + b"\n")
    file.close()
