"""Logging: rank 0 on the console, every rank's file whole, warnings and exceptions included."""

import io
import json
import logging
import os
import signal
import subprocess
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
KIB = 1 / 1024  # in MiB


def state() -> dict[str, Any]:
    """What Logs changes in this process."""
    return {
        "callHandlers": logging.Logger.callHandlers,
        "handle": logging.Handler.handle,
        "threading.excepthook": threading.excepthook,
        "showwarning": warnings.showwarning,
    }


Opener = Callable[..., Logs]


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Opener]:
    """Starts a rank's Logs, in this directory unless it is not to be opened; all is ended, and put
    back, afterwards."""
    hook, made = threading.excepthook, list[Logs]()
    level = logging.getLogger("launcher").level

    def make(rank: int = 0, level: str = "INFO", open: bool = True, **options: Any) -> Logs:
        topology = Topology(rank, rank, 4, 4, launched_by="torchrun")
        made.append(Logs(topology, level, ["mine"], **options).__enter__())
        if open:
            made[-1].open(tmp_path / "logs")
        return made[-1]

    yield make
    for one in made:
        one.__exit__()
    logging.getLogger("launcher").setLevel(level)
    logging.getLogger("mine").setLevel(logging.NOTSET)
    threading.excepthook = hook


def file_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank{rank}.log").read_text(encoding="utf-8")


def test_early_lines_reach_the_file_in_order(logs: Opener, tmp_path: Path) -> None:
    made = logs(open=False)
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
    """Rank 0 speaks; of another rank errors are heard, the rest is in its file."""
    logs(rank)
    logger.info("all is well")
    logging.getLogger("mine").info("my own task")
    logging.getLogger("some.package").info("chatter")
    logger.warning("look here")
    logger.error("it is broken")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    for text in ("all is well", "my own task", "look here"):
        assert (text in err) is (rank == 0)
    assert ("rank 2: it is broken" if rank else " E it is broken") in err
    written = file_of(tmp_path, rank)
    assert all(text in written for text in ("all is well", "my own task", "look here", "broken"))
    assert "chatter" not in err + written
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
    logs()
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
            warnings.warn("this is deprecated", stacklevel=1)
            made.__exit__()
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
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    before = state()
    made = logs(open=opened)
    assert all(state()[key] != value for key, value in before.items())
    made.__exit__()
    assert state() == before
    logger.warning("too late")
    assert not opened or not (tmp_path / "logs/rank0.log").exists()


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


# Its files may be so large: a write beyond that fails, as on a full disk.
FULL = """
import logging, resource, signal, sys
from pathlib import Path
from launcher.runtime.topology import Topology
from launcher.telemetry.logs import Logs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
with Logs(Topology(), "INFO", [], file_mb=0.0) as logs:
    logs.open(Path(sys.argv[1]))
    for number in range(60):
        logging.getLogger("launcher").info("line %d %s", number, "x" * 60)
print("done")
"""


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "done\n" and "Error" not in ended.stderr
    assert ended.stderr.count("line ") == 60
    assert 10 < (tmp_path / "rank0.log").read_text().count("line ") < 60


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
    logs: Opener, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of any length. The rank alone rotates the file that holds them."""
    logs(file_mb=KIB, files_kept=1)

    def work() -> None:
        logger.info("größer %s", "ö" * 100_000)
        try:
            raise ValueError("in a worker")
        except ValueError:
            logger.exception("it failed")

    in_workers(2, work)
    assert "ö" * 100_000 in (text := file_of(tmp_path))
    assert text.count("ValueError: in a worker") == 2
    assert capfd.readouterr().err.count("ValueError: in a worker") == 2
    assert len(list((tmp_path / "logs").iterdir())) == 1
    logger.info("of the rank")
    assert "of the rank" in file_of(tmp_path) and "größer" not in file_of(tmp_path)


def test_a_worker_that_was_forked_before_the_file_was_opened(logs: Opener, tmp_path: Path) -> None:
    made = logs(open=False)
    logger.info("of the rank")
    (read, write), (back, told) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        logger.info("not yet")
        os.write(told, b"x")
        os.read(read, 1)
        logger.info("of the worker")
        os._exit(0)
    os.read(back, 1)
    made.open(tmp_path / "logs")
    os.write(write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lines = [line.rpartition(": ")[2] for line in file_of(tmp_path).splitlines()]
    assert lines == ["of the rank", "not yet", "of the worker"]
    for descriptor in (read, write, back, told):
        os.close(descriptor)


class InUse(io.StringIO):
    """A stream that another thread was writing to when the process was forked."""

    def write(self, text: str) -> int:
        threading.Event().wait()
        return 0


def test_a_worker_waits_for_no_lock_of_its_rank(
    logs: Opener, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = logs()
    made.console.setStream(InUse())
    with made.file.lock or threading.Lock(), made.console.lock or threading.Lock():
        in_workers(1, lambda: logger.error("of the worker"))
    assert "of the worker" in file_of(tmp_path) and "of the worker" in capfd.readouterr().err


def test_a_broken_log_call_ends_nothing(
    logs: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Python's own handlers: it is told of on stderr."""
    made = logs()
    # pytest's own handler would raise.
    for handler in (made.console, made.file):
        handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": 40}))
        assert "Logging error" in capsys.readouterr().err
    logger.info("after")
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
        logs(level="DEBUG")
        theirs.info("chatter")
        theirs.warning("look here")
        assert (theirs.level, theirs.propagate, list(theirs.handlers), root.level) == before
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
    logs()
    logger.warning("look here")
    assert ("\x1b[33m" in stream.getvalue()) is coloured
    assert "look here" in stream.getvalue()
    assert "\x1b" not in file_of(tmp_path)
