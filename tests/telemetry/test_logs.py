"""Logging: rank 0 on the console, every rank's file whole, warnings and exceptions included."""

import io
import json
import logging
import multiprocessing
import resource
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.runtime.topology import Topology
from launcher.telemetry.logs import Logs
from tests.telemetry.helpers import exit_code, fork

logger = logging.getLogger("launcher.test")
KIB = 1 / 1024  # in MiB
Captured = pytest.CaptureFixture[str]
Opener = Callable[..., Logs]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Starts a rank's Logs, in this directory unless it is not to be opened; all is ended, and put
    back, afterwards."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with ExitStack() as made:

        def make(rank: int = 0, level: str = "INFO", open: bool = True, **options: Any) -> Logs:
            topology = Topology(rank, rank, 4, 4, launched_by="torchrun")
            one = made.enter_context(Logs(topology, level, ["mine"], **options))
            if open:
                one.open(tmp_path / "logs")
            return one

        yield make
    for name in ("launcher", "mine"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def file_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank{rank}.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("rank", [0, 2])
def test_console_and_file_of_a_rank(
    rank: int, logs: Opener, tmp_path: Path, capsys: Captured
) -> None:
    """Rank 0 speaks; of another rank errors are heard, the rest is in its file."""
    logs(rank)
    logger.info("all is well")
    logging.getLogger("mine").info("my own task")
    logger.warning("look here")
    logger.error("it is broken")
    logger.error("for the file", extra={"file_only": True})
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "for the file" not in err
    for text in ("all is well", "my own task", "look here"):
        assert (text in err) is (rank == 0)
    assert ("rank 2: it is broken" if rank else " E it is broken") in err
    written = file_of(tmp_path, rank)
    for text in ("all is well", "my own task", "look here", "it is broken", "for the file"):
        assert text in written
    assert [p.name for p in (tmp_path / "logs").iterdir()] == [f"rank{rank}.log"]


@pytest.mark.parametrize(
    ("level", "shown"), [("DEBUG", "diwe"), ("INFO", "iwe"), ("WARNING", "we"), ("ERROR", "e")]
)
def test_level_of_the_console(logs: Opener, capsys: Captured, level: str, shown: str) -> None:
    logs(level=level)
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("%s!", name)
    err = capsys.readouterr().err
    assert "".join(n[0] for n in ("debug", "info", "warning", "error") if f"{n}!" in err) == shown


def test_warnings_are_logged(logs: Opener, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs()
        warnings.warn("this is deprecated", stacklevel=1)
    assert "WARNING py.warnings: " in file_of(tmp_path)
    assert "this is deprecated" in file_of(tmp_path)


def test_an_exception_in_a_thread_is_logged(logs: Opener, tmp_path: Path) -> None:
    logs()
    thread = threading.Thread(target=lambda: 1 / 0, name="saver")
    thread.start()
    thread.join()
    text = file_of(tmp_path)
    assert "CRITICAL launcher: uncaught exception in thread saver" in text
    assert "ZeroDivisionError: division by zero" in text


@pytest.mark.parametrize("opened", [True, False])
def test_the_end_puts_everything_back(
    logs: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Also a hook that was not Python's own: a notebook, a debugger and pytest have theirs."""

    def state() -> list[Any]:
        ours = logging.Logger.callHandlers, logging.Handler.handle
        return [*ours, threading.excepthook, warnings.showwarning]

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    before = state()
    made = logs(open=opened)
    assert all(now != then for now, then in zip(state(), before, strict=True))
    made.__exit__()
    assert state() == before
    logger.warning("too late")
    assert not (tmp_path / "logs/rank0.log").exists()


def test_the_file_is_rotated_and_nothing_is_lost(logs: Opener, tmp_path: Path) -> None:
    logs(1, file_mb=KIB, files_kept=2)
    for number in range(60):
        logger.info("line %d", number)
    folder = tmp_path / "logs"
    names = ["rank1.log.2", "rank1.log.1", "rank1.log"]
    assert sorted(p.name for p in folder.iterdir()) == names[::-1]
    assert all(900 < (folder / name).stat().st_size <= 1024 for name in names[:2])
    text = "".join((folder / name).read_text() for name in names)
    numbers = [int(line.rpartition(" ")[2]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 60)) and numbers[0] < 40


@pytest.mark.parametrize("options", [{"file_mb": 0.0}, {"file_mb": KIB, "files_kept": 0}])
def test_without_a_limit_or_older_files_one_file_grows(
    options: dict[str, Any], logs: Opener, tmp_path: Path
) -> None:
    logs(**options)
    for number in range(60):
        logger.info("line %d", number)
    assert len(file_of(tmp_path).splitlines()) == 60
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_a_line_of_json(logs: Opener, tmp_path: Path) -> None:
    logs(form="json")
    try:
        raise ValueError("größer\nas thought")
    except ValueError:
        logger.exception("two\nlines")
    (line,) = file_of(tmp_path).splitlines()
    entry = json.loads(line)
    assert entry["message"] == "two\nlines" and entry["level"] == "ERROR"
    assert "ValueError: größer" in entry["exception"] and entry["time"] > 1e9


def test_a_full_disk_loses_lines_and_nothing_else(
    logs: Opener, tmp_path: Path, capsys: Captured
) -> None:
    logs(file_mb=0.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write beyond that fails, as on a full disk: Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        for number in range(60):
            logger.info("line %d %s", number, "x" * 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert err.count("line ") == 60 and "Error" not in err
    assert 10 < file_of(tmp_path).count("line ") < 60


def test_workers_lines_are_the_ranks(logs: Opener, tmp_path: Path, capfd: Captured) -> None:
    """Of any length. The rank alone rotates the file that holds them."""
    logs(file_mb=KIB, files_kept=1)

    def work() -> None:
        logger.info("größer %s", "ö" * 100_000)
        try:
            raise ValueError("in a worker")
        except ValueError:
            logger.exception("it failed")

    for _ in range(2):
        assert exit_code(fork(work)) == 0
    assert "ö" * 100_000 in (text := file_of(tmp_path))
    assert text.count("ValueError: in a worker") == 2
    assert capfd.readouterr().err.count("ValueError: in a worker") == 2
    assert len(list((tmp_path / "logs").iterdir())) == 1
    logger.info("of the rank")
    assert "of the rank" in file_of(tmp_path) and "größer" not in file_of(tmp_path)


def test_early_lines_reach_the_file_in_order_also_those_of_a_worker(
    logs: Opener, tmp_path: Path
) -> None:
    made, said, opened = logs(open=False), multiprocessing.Event(), multiprocessing.Event()
    logger.info("of the rank")

    def work() -> None:
        logger.info("not yet")
        said.set()
        assert opened.wait(20)
        logger.info("of the worker")

    child = fork(work)
    assert said.wait(20) and not (tmp_path / "logs").exists()
    made.open(tmp_path / "logs")
    opened.set()
    assert exit_code(child) == 0
    logger.info("after")
    lines = [line.split(" ", 2)[2] for line in file_of(tmp_path).splitlines()]
    texts = ("of the rank", "not yet", "of the worker", "after")
    assert lines == [f"INFO launcher.test: {text}" for text in texts]


def test_a_worker_waits_for_no_lock_of_its_rank(
    logs: Opener, tmp_path: Path, capfd: Captured
) -> None:
    """Nor for a stream that another thread was writing to when it was forked."""
    made = logs()
    in_use: Any = SimpleNamespace(write=lambda _: threading.Event().wait(), flush=lambda: None)
    made.console.setStream(in_use)
    with made.file.lock or threading.Lock(), made.console.lock or threading.Lock():
        assert exit_code(fork(lambda: logger.error("of the worker"))) == 0
    assert "of the worker" in file_of(tmp_path) and "of the worker" in capfd.readouterr().err


def test_a_broken_log_call_ends_nothing(logs: Opener, tmp_path: Path, capsys: Captured) -> None:
    """As with Python's own handlers: it is told of on stderr."""
    made = logs()
    # pytest's own handler would raise.
    for handler in (made.console, made.file):
        handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": 40}))
        assert "Logging error" in capsys.readouterr().err
    logger.info("after")
    assert "after" in file_of(tmp_path)


def test_loggers_of_libraries_are_left_alone(
    logs: Opener, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their levels, handlers and propagation; and the root logger's level, which is theirs."""
    theirs, root, stream = logging.getLogger("some.package"), logging.getLogger(), io.StringIO()
    monkeypatch.setattr(theirs, "handlers", [logging.StreamHandler(stream)])
    before = theirs.level, theirs.propagate, list(theirs.handlers), root.level
    logs(level="DEBUG")
    theirs.info("chatter")
    theirs.warning("look here")
    assert (theirs.level, theirs.propagate, list(theirs.handlers), root.level) == before
    assert stream.getvalue() == "look here\n"
    for text in (capsys.readouterr().err, file_of(tmp_path)):
        assert "look here" in text and "chatter" not in text


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
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    logs()
    logger.warning("look here")
    assert ("\x1b[33m" in stream.getvalue()) is coloured
    assert "look here" in stream.getvalue()
    assert "\x1b" not in file_of(tmp_path)
