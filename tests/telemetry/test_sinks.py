"""Sinks: strict JSON a line, and a file that grows by whole pieces."""

import errno
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.telemetry.media import Media
from launcher.telemetry.sinks import AppendFile, JsonLines
from tests.system.jobs import json_lines, strict_json

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0, "samples": 8, "time": 1e9, "train/loss": 0.1, "val/größe": 1 / 3},
    {"step": 2, "epoch": 0, "samples": 16, "time": 2e9, "train/loss": 1e-30, "perf/step_s": 3},
    {"step": 9, "epoch": 1, "samples": 72, "time": 3e9 + 0.5, "train/loss": math.pi * 1e20},
]
NOTE = Media("text", ["note"], "none of its business", 1)

numbers = st.floats() | st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k != "nonfinite"), numbers))
@example({"step": 1, "a": math.nan, "b": -math.inf, "c": math.inf, "d": 1.0})
def test_a_record_is_strict_json(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    """Numbers come back to the last bit, and the record itself is left alone."""
    path, before = tmp_path_factory.mktemp("law") / "metrics.jsonl", dict(values)
    JsonLines(path).write([values])
    assert values == before
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    found = strict_json(path.read_text(encoding="utf-8"))
    assert found.pop("nonfinite", []) == bad
    assert found == {k: None if k in bad else v for k, v in values.items()}


def test_an_attempt_appends_its_records_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for part in (RECORDS[:2], [NOTE, RECORDS[2]]):
        sink = JsonLines(path)
        sink.write(part)
        found = json_lines(path)  # on disk then: a killed run has lost nothing
        sink.write([NOTE])
        sink.close(False)
    assert json_lines(path) == found == RECORDS


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


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 20)), max_size=12))
@example([(b"piece", 2), (b"piece", 2), (b"piece", 100)])
def test_a_file_has_whole_pieces_in_order_whatever_room_there_is(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bytes, int]]
) -> None:
    file, written = AppendFile(tmp_path_factory.mktemp("law") / "new" / "file"), b"start"
    disk = Disk(file, 0)
    for piece, disk.room in pieces:
        if disk.room >= len(piece):
            file.append(piece)
            written += piece
        else:
            with pytest.raises(OSError, match="No space"):
                file.append(piece)
        assert file.path.read_bytes() == written
    file.close()


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
