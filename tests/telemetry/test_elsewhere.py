"""Warnings of other ranks: seen once, whoever else gives them, and always seen."""

import logging
import time
from pathlib import Path

import pytest

from launcher.telemetry import elsewhere
from launcher.telemetry.elsewhere import Elsewhere, read
from launcher.telemetry.logfile import LogFile


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("py.warnings", level, "file.py", 1, text, None, None)


def write(folder: Path, rank: int, *records: logging.LogRecord, form: str = "text") -> None:
    folder.mkdir(exist_ok=True)
    file = LogFile(folder / f"rank{rank}.log", form, 10, 1)
    for one in records:
        file.emit(one)
    file.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "WAIT_S", 0.05)


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_lower_rank_gives_as_well_is_not_shown_again(form: str, tmp_path: Path) -> None:
    write(tmp_path, 0, record("of all\nsecond line"), form=form)
    write(tmp_path, 1, record("of rank 1 and 2"), form=form)
    write(tmp_path, 3, record("of rank 2 and 3"), form=form)
    shown: list[str] = []
    held = Elsewhere(2, 2, lambda r: shown.append(r.getMessage()))
    for text in ("of all\nsecond line", "of rank 1 and 2", "of rank 2 and 3", "of rank 2"):
        held.add(record(text))
    held.open(tmp_path)
    held.close()
    assert shown == ["of rank 2 and 3", "of rank 2"]


def test_a_rank_of_another_host_looks_at_rank_0_and_its_own_host(tmp_path: Path) -> None:
    assert Elsewhere(6, 2, print).lower == [0, 4, 5]
    assert Elsewhere(4, 0, print).lower == [0]


def test_it_is_shown_a_moment_later_without_the_end(tmp_path: Path) -> None:
    shown: list[str] = []
    held = Elsewhere(1, 1, lambda r: shown.append(r.getMessage()))
    held.open(tmp_path / "absent")
    held.add(record("alone"))
    deadline = time.monotonic() + 30
    while not shown and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shown == ["alone"]
    held.close()


def test_one_that_comes_while_it_waits_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "WAIT_S", 60.0)
    shown: list[str] = []
    held = Elsewhere(1, 1, lambda r: shown.append(r.getMessage()))
    held.open(tmp_path)
    held.add(record("of both"))
    write(tmp_path, 0, record("of both"))
    held.close()
    assert shown == []


def test_an_old_attempts_line_hides_nothing(tmp_path: Path) -> None:
    old = record("again")
    old.created -= 3600
    write(tmp_path, 0, old)
    shown: list[str] = []
    held = Elsewhere(1, 1, lambda r: shown.append(r.getMessage()))
    held.open(tmp_path)
    held.add(record("again"))
    held.close()
    assert shown == ["again"]


def test_a_rotated_file_is_looked_at(tmp_path: Path) -> None:
    write(tmp_path, 0, record("before"))
    (tmp_path / "rank0.log").rename(tmp_path / "rank0.log.1")
    held = Elsewhere(1, 1, print)
    held.open(tmp_path)
    assert held.given(record("before"))


def test_a_count_goes_with_its_message(tmp_path: Path) -> None:
    """Ranks count differently; the lower rank's count speaks for all."""
    write(tmp_path, 0, record("often"))
    held = Elsewhere(1, 1, print)
    held.open(tmp_path)
    counted = record("(repeated 7 times in 60 s) often")
    counted.repeated = "often"
    assert held.given(counted)
    held.close()


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.write_bytes(b'\xff\xfe{"time"\n{"time": 1}\n{"time": "x", "message": 3}\n[1]\n\nplain\n')
    assert list(read(path, 0.0)) == []
