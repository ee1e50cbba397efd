"""A file that grows by whole pieces."""

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.telemetry.sinks import AppendFile


class Disk:
    """An open file on a disk that has room for so many bytes more."""

    def __init__(self, file: AppendFile, room: int) -> None:
        file.append(b"start")
        self.room, self.cuts, self.raw = room, True, file.file
        file.file = self  # type: ignore[assignment]

    def write(self, data: bytes) -> int:
        taken = bytes(data)[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(taken)
        return self.raw.write(taken)  # type: ignore[union-attr]

    def truncate(self, length: int) -> int:
        if not self.cuts:
            raise OSError(errno.EIO, "Input/output error")
        return self.raw.truncate(length)  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def test_a_piece_that_does_not_fit_leaves_no_part(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "new" / "file")
    disk = Disk(file, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            file.append(b"piece")
        assert file.path.read_bytes() == b"start"
        disk.room = 2
    disk.room = 100
    file.append(b"piece")
    file.close()
    assert file.path.read_bytes() == b"startpiece"


def test_a_part_that_could_not_be_cut_off_is_cut_off_later(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "file")
    disk = Disk(file, 2)
    disk.cuts = False
    with pytest.raises(OSError, match="No space"):
        file.append(b"piece")
    assert file.path.read_bytes() == b"startpi"
    disk.room = 100
    with pytest.raises(OSError, match="Input/output"):
        file.append(b"piece")
    disk.cuts = True
    file.append(b"piece")
    file.close()
    assert file.path.read_bytes() == b"startpiece"


def test_nothing_is_made_for_nothing(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "folder" / "file")
    file.append(b"")
    file.close()
    assert not (tmp_path / "folder").exists()


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 20)), max_size=12))
def test_whole_pieces_in_order_whatever_room_there_is(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bytes, int]]
) -> None:
    file, written = AppendFile(tmp_path_factory.mktemp("law") / "file"), b"start"
    disk = Disk(file, 0)
    for piece, disk.room in pieces:
        if disk.room >= len(piece):
            file.append(piece)
            written += piece
        else:
            with pytest.raises(OSError):
                file.append(piece)
        assert file.path.read_bytes() == written
    file.close()
