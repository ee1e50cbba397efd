"""A file that grows by whole pieces, also on a disk that is full at times."""

from __future__ import annotations

import contextlib
import errno
import os
from io import FileIO
from pathlib import Path


class AppendFile:
    """Each piece is in the file as a whole, or not at all. It is opened with the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: FileIO | None = None
        self.length = 0  # of whole pieces in the file

    def append(self, piece: bytes) -> None:
        """Write a piece. Raises OSError where that is not possible; no part of it is left then."""
        if not piece:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what failed must not be written later by itself, after a part of it.
            self.file = FileIO(self.path, "ab")
            self.length = self.file.seek(0, os.SEEK_END)
        try:
            self._cut()  # what could not be cut off when it failed
            self._write(self.file, piece)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self.length += len(piece)

    def _write(self, file: FileIO, piece: bytes) -> None:
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
