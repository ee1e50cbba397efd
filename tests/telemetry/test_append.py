"""A file that grows by whole pieces."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.telemetry import append
from launcher.telemetry.append import AppendFile, append_line


class Full:
    """A disk with room for so many bytes more, as a stand-in for the file's own write."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, write: Callable[[bytes], int], data: bytes) -> int:
        taken = bytes(data)[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(taken)
        return write(taken)


def limit(file: AppendFile, disk: Full) -> None:
    """Put the disk under an open file."""
    assert file.file is not None
    write = file.file.write

    class Limited:
        def __getattr__(self, name: str) -> object:
            return getattr(raw, name)

        def write(self, data: bytes) -> int:
            return disk(write, data)

    raw, file.file = file.file, Limited()  # type: ignore[assignment]


def test_a_piece_that_does_not_fit_leaves_no_part_and_comes_later(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "new" / "file")
    file.add(b"one\n")
    file.flush()
    disk = Full(6)
    limit(file, disk)
    file.add(b"two\n")
    file.add(b"three\n")
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            file.flush()
        assert file.path.read_bytes() == b"one\n"
        disk.room = 6
    disk.room = 100
    file.add(b"four\n")
    file.flush()
    assert file.path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    file.close()


def test_a_part_that_could_not_be_cut_off_is_cut_off_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "file")
    file.add(b"one\n")
    file.flush()
    disk = Full(2)
    limit(file, disk)
    file.add(b"two\n")
    with monkeypatch.context() as patch:
        patch.setattr(file, "_mend", lambda: None)
        with pytest.raises(OSError):
            file.flush()
    assert file.path.read_bytes() == b"one\ntw"
    disk.room = 100
    file.flush()
    assert file.path.read_bytes() == b"one\ntwo\n"
    file.close()


def test_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for line in ("one", "two"):
        append_line(path, line)
    assert path.read_text() == "one\ntwo\n"


def test_nothing_is_made_for_nothing(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "folder" / "file")
    file.flush()
    file.close()
    assert not (tmp_path / "folder").exists()


def test_too_much_that_waits_is_lost_and_every_flush_says_so(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "file", limit=8)
    for piece in (b"12345", b"678", b"lost", b""):
        file.add(piece)
    for _ in range(2):
        with pytest.raises(OSError, match="1 records were lost"):
            file.flush()
        assert file.path.read_bytes() == b"12345678"


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 20)), max_size=12))
def test_whole_pieces_in_order_whatever_room_there_is(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bytes, int]]
) -> None:
    """Of all that waits as one part: what is written at once is written whole."""
    file = AppendFile(tmp_path_factory.mktemp("law") / "file")
    file.add(b"start")
    file.flush()
    disk = Full(0)
    limit(file, disk)
    written, waiting = b"start", b""
    for piece, room in pieces:
        file.add(piece)
        waiting += piece
        disk.room = room
        if room >= len(waiting):
            written, waiting = written + waiting, b""
            file.flush()
        else:
            with pytest.raises(OSError):
                file.flush()
        assert file.path.read_bytes() == written
    disk.room = 1000
    file.close()
    assert file.path.read_bytes() == written + waiting


def test_much_that_waited_is_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try that fails costs no more than one of them, and what was written is not tried again."""
    monkeypatch.setattr(append, "PART", 10)
    file = AppendFile(tmp_path / "file")
    file.add(b"start")
    file.flush()
    disk = Full(0)
    limit(file, disk)
    for number in range(10):
        file.add(b"%d" % number * 5)
    with pytest.raises(OSError):
        file.flush()
    disk.room = 25
    with pytest.raises(OSError):
        file.flush()
    assert file.path.read_bytes() == b"start" + b"0000011111" + b"2222233333"
    disk.room = 1000
    file.flush()
    assert file.path.read_bytes() == b"start" + b"".join(b"%d" % n * 5 for n in range(10))
    file.close()
