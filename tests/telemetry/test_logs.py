"""Logging: rank 0 on the console, every rank's file whole, warnings and exceptions included."""

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runtime.topology import Topology
from launcher.telemetry.logs import Logs

logger = logging.getLogger("launcher.test")


def state() -> dict[str, Any]:
    """What Logs changes in this process."""
    return {
        "handlers": list(logging.getLogger().handlers),
        "excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "showwarning": warnings.showwarning,
    }


Opener = Callable[..., Logs]


@pytest.fixture
def logs() -> Iterator[Opener]:
    """Makes a rank's Logs and puts everything back afterwards, whatever close() does."""
    before, made = state(), []
    level = logging.getLogger("launcher").level

    def make(rank: int = 0, level: str = "INFO") -> Logs:
        topology = Topology(rank, rank, 4, 4, launched_by="torchrun")
        made.append(Logs(topology, level, ["mine"]))
        return made[-1]

    yield make
    for one in made:
        one.close()
    logging.getLogger("launcher").setLevel(level)
    logging.getLogger("mine").setLevel(logging.NOTSET)
    sys.excepthook = before["excepthook"]
    threading.excepthook = before["threading.excepthook"]


def file_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank{rank}.log").read_text(encoding="utf-8")


def test_early_lines_reach_the_file_in_order(logs: Opener, tmp_path: Path) -> None:
    made = logs()
    logger.info("before there was a directory")
    assert not (tmp_path / "logs").exists()
    made.open(tmp_path / "logs")
    logger.info("after")
    early, late = file_of(tmp_path).splitlines()
    assert early.endswith("INFO launcher.test: before there was a directory")
    assert late.endswith("INFO launcher.test: after")


@pytest.mark.parametrize("rank", [0, 2])
def test_console_and_file_of_a_rank(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    logs(rank).open(tmp_path / "logs")
    logger.info("all is well")
    logging.getLogger("mine").info("my own task")
    logging.getLogger("some.package").info("chatter")
    logger.warning("look here")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    for text, shown in (("all is well", rank == 0), ("my own task", rank == 0), ("chatter", False)):
        assert (text in err) is shown
    assert ("rank 2: look here" if rank else " W look here") in err
    written = file_of(tmp_path, rank)
    assert all(text in written for text in ("all is well", "my own task", "look here"))
    assert [p.name for p in (tmp_path / "logs").iterdir()] == [f"rank{rank}.log"]


@pytest.mark.parametrize(
    ("level", "shown"), [("DEBUG", "diwe"), ("INFO", "iwe"), ("WARNING", "we"), ("ERROR", "e")]
)
def test_level_of_the_console(
    logs: Opener, capsys: pytest.CaptureFixture[str], level: str, shown: str
) -> None:
    logs(level=level)
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("%s!", name)
    err = capsys.readouterr().err
    assert "".join(n[0] for n in ("debug", "info", "warning", "error") if f"{n}!" in err) == shown


def test_file_only_lines_stay_off_the_console(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs().open(tmp_path / "logs")
    logger.info("for the file", extra={"file_only": True})
    assert "for the file" not in capsys.readouterr().err
    assert "for the file" in file_of(tmp_path)


def test_warnings_are_logged(logs: Opener, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # pytest's own catcher stands where Python's own function would be.
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            made = logs()
            made.open(tmp_path / "logs")
            warnings.warn("this is deprecated", stacklevel=1)
            made.close()
    assert "WARNING py.warnings: " in file_of(tmp_path)
    assert "this is deprecated" in file_of(tmp_path)


def test_an_exception_in_a_thread_is_logged(logs: Opener, tmp_path: Path) -> None:
    logs().open(tmp_path / "logs")
    thread = threading.Thread(target=lambda: 1 / 0, name="saver")
    thread.start()
    thread.join()
    text = file_of(tmp_path)
    assert "CRITICAL launcher: uncaught exception in thread saver" in text
    assert "ZeroDivisionError: division by zero" in text


def test_an_uncaught_exception_is_logged(logs: Opener, tmp_path: Path) -> None:
    logs(1).open(tmp_path / "logs")
    error = ValueError("nobody caught this")
    sys.excepthook(ValueError, error, None)
    assert "CRITICAL launcher: uncaught exception" in file_of(tmp_path, 1)
    assert "ValueError: nobody caught this" in file_of(tmp_path, 1)


@pytest.mark.parametrize("opened", [True, False])
def test_close_puts_everything_back(
    logs: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Also hooks that were not Python's own: a notebook, a debugger and pytest have theirs."""
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    before = state()
    made = logs()
    if opened:
        made.open(tmp_path / "logs")
    made.close()
    assert state() == before


def test_a_closed_file_gets_no_more_lines(logs: Opener, tmp_path: Path) -> None:
    made = logs()
    made.open(tmp_path / "logs")
    made.close()
    logger.warning("too late")
    assert "too late" not in file_of(tmp_path)
