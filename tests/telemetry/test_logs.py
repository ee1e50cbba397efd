"""Logging: rank 0 on the console, every rank's file whole, warnings and exceptions included."""

import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runtime.topology import Topology
from launcher.telemetry.logfile import LogFile
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
    made = logs(rank)
    made.open(tmp_path / "logs")
    logger.info("all is well")
    logging.getLogger("mine").info("my own task")
    logging.getLogger("some.package").info("chatter")
    logger.warning("look here")
    made.close()  # a warning of another rank waits for a moment before
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


def test_a_repeat_is_counted_and_the_count_is_seen(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = logs()
    made.open(tmp_path / "logs")
    for _ in range(5):
        logger.warning("again")
        logger.info("between")
    made.close()
    for text in (capsys.readouterr().err, file_of(tmp_path)):
        lines = [line for line in text.splitlines() if "again" in line]
        assert len(lines) == 2
        assert "(repeated 4 times in 0 s) again" in lines[1]


def test_the_file_is_rotated_and_nothing_is_lost(logs: Opener, tmp_path: Path) -> None:
    topology = Topology(1, 1, 4, 4, launched_by="torchrun")
    made = Logs(topology, "INFO", [], "text", file_mb=1000 / 2**20, files_kept=2)
    try:
        made.open(tmp_path / "logs")
        for number in range(60):
            logger.info("line %d", number)
    finally:
        made.close()
    folder = tmp_path / "logs"
    assert sorted(p.name for p in folder.iterdir()) == ["rank1.log", "rank1.log.1", "rank1.log.2"]
    assert all(p.stat().st_size <= 1000 for p in folder.iterdir())
    text = "".join(
        (folder / name).read_text() for name in ("rank1.log.2", "rank1.log.1", "rank1.log")
    )
    numbers = [int(line.rpartition(" ")[2]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 60)) and numbers[0] < 40


def test_a_line_of_json(logs: Opener, tmp_path: Path) -> None:
    made = Logs(Topology(), "INFO", [], form="json")
    try:
        made.open(tmp_path / "logs")
        try:
            raise ValueError("größer\nas thought")
        except ValueError:
            logger.exception("two\nlines")
    finally:
        made.close()
    (line,) = file_of(tmp_path).splitlines()
    entry = json.loads(line)
    assert entry["message"] == "two\nlines" and entry["level"] == "ERROR"
    assert "ValueError: größer" in entry["exception"] and entry["time"] > 1e9


def test_a_full_disk_loses_lines_and_nothing_else(
    logs: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the file is rotated, where closing the old one fails."""
    made = Logs(Topology(), "INFO", [], file_mb=300 / 2**20, files_kept=1)
    try:
        made.open(tmp_path / "logs")
        assert isinstance(made.file, LogFile)

        class Full:
            """A stream on a disk without a byte left."""

            closed = False

            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def write(self, text: str) -> None:
                raise OSError(28, "No space left on device")

            def close(self) -> None:
                self.stream.close()
                raise OSError(28, "No space left on device")

            flush = write

            def __getattr__(self, name: str) -> Any:
                return getattr(self.stream, name)

        logger.info("first %s", "x" * 200)
        made.file.stream = Full(made.file.stream)
        logger.info("second %s", "x" * 200)  # rotated on the way
        logger.info("third")
    finally:
        made.close()
    assert "third" in file_of(tmp_path)


def in_workers(count: int, work: Callable[[], None]) -> None:
    """Do this in forked processes, one after the other, as loader workers end."""
    for _ in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(20)  # nothing in it may wait for the rank
                work()
                logging.shutdown()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_workers_lines_are_the_ranks(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their repeats are counted together, and the rank rotates the file that holds them."""
    made = Logs(Topology(), "INFO", [], file_mb=370 / 2**20, files_kept=1)
    try:
        made.open(tmp_path / "logs")
        logger.info("of the rank %s", "x" * 200)
        in_workers(3, lambda: logger.warning("a bad sample %s", "x" * 100))
    finally:
        made.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "bad sample" in line]
    assert len(lines) == 2 and "(repeated 2 times in 0 s) a bad sample" in lines[1]
    assert file_of(tmp_path).count("WARNING launcher.test: ") == 2
    assert "of the rank" in (tmp_path / "logs/rank0.log.1").read_text()


def test_a_worker_can_log_whatever_it_likes(logs: Opener, tmp_path: Path) -> None:
    """More than a pipe takes, and lines that are too long."""
    made = logs()
    made.open(tmp_path / "logs")

    def work() -> None:
        logger.info("größer %s", "ö" * 100_000)
        try:
            raise ValueError("in a worker")
        except ValueError:
            logger.exception("it failed")

    def flood() -> None:
        for number in range(2000):
            logger.info("%d %s", number, "x" * 2000)

    in_workers(1, work)
    made.funnel.acquire()  # the rank itself is stuck in a log line
    in_workers(1, flood)
    made.funnel.release()
    in_workers(1, lambda: logger.info("the last"))
    made.close()
    text = file_of(tmp_path)
    assert "größer ööö" in text and "ValueError: in a worker" in text and "the last" in text


def test_a_broken_log_call_ends_nothing(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Python's own handlers: it is told of on stderr."""
    made = logs()
    made.open(tmp_path / "logs")
    # pytest's own handler would raise.
    made.funnel.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    logger.info("after")
    assert "Logging error" in capsys.readouterr().err
    assert "after" in file_of(tmp_path)


def test_loggers_of_libraries_are_left_alone(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their levels, handlers and propagation; and the root logger's level, which is theirs."""
    theirs, root = logging.getLogger("some.package"), logging.getLogger()
    own = logging.StreamHandler(stream := io.StringIO())
    theirs.addHandler(own)
    try:
        before = theirs.level, theirs.propagate, list(theirs.handlers), root.level
        made = logs(level="DEBUG")
        made.open(tmp_path / "logs")
        theirs.info("chatter")
        theirs.warning("look here")
        assert (theirs.level, theirs.propagate, list(theirs.handlers), root.level) == before
        made.close()
    finally:
        theirs.removeHandler(own)
    assert stream.getvalue() == "look here\n"
    for text in (capsys.readouterr().err, file_of(tmp_path)):
        assert "look here" in text and "chatter" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "env", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_on_a_terminal_only(
    terminal: bool,
    env: dict[str, str],
    coloured: bool,
    logs: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    made = logs()
    made.open(tmp_path / "logs")
    logger.warning("look here")
    made.close()
    assert ("\x1b[33m" in stream.getvalue()) is coloured
    assert "look here" in stream.getvalue()
    assert "\x1b" not in file_of(tmp_path)
