"""Logging that others set up beside ours: who shows which line, on the console and in files."""

import logging
import logging.config
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from launcher.log import get_logger
from launcher.runtime.topology import Topology
from launcher.telemetry.logs import Logs

ROOT = Path(__file__).parents[2]
# What others.py says: who, at which level, and what.
SAID = [
    ("launcher.x", "INFO", "a step"),
    ("task", "INFO", "my line"),
    ("task", "ERROR", "my error"),
    ("some.package", "WARNING", "their warning"),
    ("launcher.x", "ERROR", "a failure"),
    ("py.warnings", "WARNING", "careful"),
]
THEIRS = {"task", "some.package", "py.warnings"}
# Before or after the launcher set its own up, and on which rank.
EVERY_WAY = pytest.mark.parametrize(
    ("when", "rank"),
    [
        ("before", 0),
        ("after", 1),
        pytest.param("before", 1, marks=pytest.mark.slow),
        pytest.param("after", 0, marks=pytest.mark.slow),
    ],
)
LEVELS = {"INFO": 20, "WARNING": 30, "ERROR": 40}


class Spoken:
    """What a program of others.py left on its standard streams and in its files."""

    def __init__(self, folder: Path, set_up: str, when: str, rank: int) -> None:
        command = [sys.executable, "-m", "tests.telemetry.others", set_up, when, str(rank)]
        ended = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stderr
        assert not re.search(r"Traceback|Logging error", ended.stderr), ended.stderr
        self.out, self.err = self.lines(ended.stdout), self.lines(ended.stderr)
        self.file = self.lines((folder / f"logs/rank{rank}.log").read_text())
        log = folder / "theirs.log"
        self.theirs = self.lines(log.read_text()) if log.exists() else None

    @staticmethod
    def lines(text: str) -> list[str]:
        """Without dates, times, and what fills a line up."""
        date = re.compile(r"^(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d(,\d+)? ")
        return [date.sub("", line).rstrip() for line in text.splitlines()]


def in_file(*muted: str) -> list[str]:
    """What our file must have: every line once."""
    return [f"{level} {name}: {text}" for name, level, text in SAID if name not in muted]


def in_theirs(*muted: str) -> list[str]:
    """What a file of theirs must have."""
    return [f"theirs {level} {text}" for name, level, text in SAID if name not in muted]


def shown(rank: int, theirs: set[str], least: int = 0, muted: tuple[str, ...] = ()) -> list[str]:
    """The lines of the console, where a handler of theirs shows the lines of these loggers, from a
    level on, and ours all others."""
    lines = []
    for name, level, text in SAID:
        if name in muted or (rank and LEVELS[level] < LEVELS["ERROR"]):
            continue
        if name in theirs and LEVELS[level] >= least:
            lines.append(f"theirs {level} {text}")
        else:
            lines.append(f"{level[0]} {f'rank {rank}: ' if rank else ''}{text}")
    return lines


@EVERY_WAY
@pytest.mark.parametrize(
    ("set_up", "theirs", "least"),
    [
        ("nothing", set(), 0),
        ("basic", THEIRS, 0),
        ("basic_force", THEIRS, 0),
        ("file_keeps", THEIRS, 0),
        ("absl", THEIRS, 0),
        ("delegating", THEIRS, 0),
        ("rich", THEIRS, 0),
        ("own_stream", {"task"}, 0),
        ("own_stream_alone", {"task"}, 0),
        ("two_streams", THEIRS, 0),
        ("errors_alone", THEIRS, 40),
        ("descriptor", THEIRS, 0),
        ("device", THEIRS, 0),
    ],
)
def test_each_line_is_shown_once_by_whoever_set_it_up(
    set_up: str, theirs: set[str], least: int, when: str, rank: int, tmp_path: Path
) -> None:
    """On the console: a line of the launcher by the launcher, any other by a handler of theirs that
    lets it through, and else by the launcher; on rank 1 errors alone. In our file all of them."""
    spoken = Spoken(tmp_path, set_up, when, rank)
    assert (spoken.out, spoken.err) == ([], shown(rank, theirs, least))
    assert spoken.file == in_file()
    assert spoken.theirs is None


@EVERY_WAY
@pytest.mark.parametrize(
    ("set_up", "on_stdout", "log"),
    [
        ("basic_stdout", THEIRS, None),
        ("basic_file", set(), in_theirs()),
        ("own_file", set(), in_theirs()),
        ("wrapping", set(), in_theirs()),
        ("dict_keeps", THEIRS, in_theirs()),
        ("dict_takes_the_launcher", THEIRS, in_theirs()),
    ],
)
def test_their_stdout_and_their_files_are_theirs(
    set_up: str, on_stdout: set[str], log: Any, when: str, rank: int, tmp_path: Path
) -> None:
    """A file of theirs has the launcher's lines too, on every rank and of every level."""
    spoken = Spoken(tmp_path, set_up, when, rank)
    lines = shown(rank, on_stdout)
    assert spoken.out == [line for line in lines if line.startswith("theirs")]
    assert spoken.err == [line for line in lines if not line.startswith("theirs")]
    assert spoken.file == in_file()
    assert spoken.theirs == log


@EVERY_WAY
def test_errors_that_they_want_on_both_streams_are_on_both(
    when: str, rank: int, tmp_path: Path
) -> None:
    spoken = Spoken(tmp_path, "out_and_errors", when, rank)
    lines = shown(rank, THEIRS)
    assert spoken.out == [line for line in lines if line.startswith("theirs")]
    launcher = [line for line in lines if not line.startswith("theirs")]
    assert sorted(spoken.err) == sorted([*launcher, "theirs ERROR my error"])
    assert spoken.file == in_file()


@EVERY_WAY
@pytest.mark.parametrize("set_up", ["dict_disables", "file_disables"])
def test_loggers_that_they_disable_are_their_own(
    set_up: str, when: str, rank: int, tmp_path: Path
) -> None:
    """As in any program; ours, and Python's warnings, go on."""
    muted = ("task", "some.package")
    spoken = Spoken(tmp_path, set_up, when, rank)
    assert sorted(spoken.out + spoken.err) == sorted(shown(rank, THEIRS, muted=muted))
    assert spoken.file == in_file(*muted)
    assert spoken.theirs in (None, in_theirs(*muted))


@EVERY_WAY
def test_logging_disable_mutes_theirs_and_not_ours(when: str, rank: int, tmp_path: Path) -> None:
    spoken = Spoken(tmp_path, "disable", when, rank)
    muted = ("task", "some.package")
    assert (spoken.out, spoken.err) == ([], shown(rank, set(), muted=muted))
    assert spoken.file == in_file(*muted)


def test_what_their_filter_rejects_is_shown_by_ours(tmp_path: Path) -> None:
    spoken = Spoken(tmp_path, "filtered", "after", 0)
    lines = shown(0, THEIRS)
    assert spoken.err == ["I my line" if "my line" in line else line for line in lines]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("set_up", ["buffered", "queued"])
def test_a_line_that_waits_on_its_way_to_their_handler_is_shown_once(
    set_up: str, rank: int, tmp_path: Path
) -> None:
    """By whichever comes first."""
    spoken = Spoken(tmp_path, set_up, "after", rank)
    texts = [text for _, level, text in SAID if level == "ERROR" or not rank]
    said = [re.sub(r"^(theirs \w+|\w( rank 1:)?) ", "", line) for line in spoken.err]
    assert sorted(said) == sorted(texts)
    assert spoken.file == in_file()


@pytest.mark.parametrize("set_up", ["own_level", "dict_quiets_the_launcher"])
def test_a_level_that_they_set_counts(set_up: str, tmp_path: Path) -> None:
    """Also for the launcher's own loggers."""
    spoken = Spoken(tmp_path, set_up, "before", 0)
    assert not [line for line in spoken.out + spoken.err + spoken.file if "a step" in line]
    assert "ERROR launcher.x: a failure" in spoken.file
    assert ("INFO task: my line" in spoken.file) is (set_up != "own_level")


def test_functions_of_logging_itself_set_nothing_up(tmp_path: Path) -> None:
    """`logging.warning` calls basicConfig where the root logger has no handler."""
    spoken = Spoken(tmp_path, "basic_unasked", "after", 0)
    assert (spoken.err, spoken.file) == (shown(0, set()), in_file())


def state(*names: str) -> dict[str, Any]:
    """What Logs might change in this process."""
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    return {
        "functions": (logging.Logger.callHandlers, logging.Handler.handle, logging.basicConfig),
        "loggers": [(x.level, x.handlers[:], x.filters[:], x.disabled, type(x)) for x in loggers],
        "hooks": (threading.excepthook, warnings.showwarning, logging.lastResort),
    }


def test_runs_one_after_the_other_leave_logging_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, say; each has its level and its file."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    logging.getLogger("py.warnings").addHandler(quiet := logging.NullHandler())
    names = ("launcher", "task", "py.warnings")
    before, own = state(*names), get_logger("launcher.x")
    for level in ("INFO", "DEBUG"):
        with Logs(Topology(), level, ["task"]) as logs:
            logs.open(tmp_path / level)
            own.debug("detail")
            own.info("step")
            logging.getLogger("task").debug("mine")
            assert state(*names)["functions"] != before["functions"]
        assert state(*names) == before
    own.error("after both")
    logging.getLogger("py.warnings").removeHandler(quiet)
    for level, lines in {"INFO": ["step"], "DEBUG": ["detail", "step", "mine"]}.items():
        text = (tmp_path / level / "rank0.log").read_text()
        assert [line.rpartition(": ")[2] for line in text.splitlines()] == lines


def test_warnings_that_were_captured_before_stay_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    logging.captureWarnings(True)
    try:
        captured = warnings.showwarning
        with Logs(Topology(), "INFO", []):
            pass
        assert warnings.showwarning is captured
    finally:
        logging.captureWarnings(False)


def test_whoever_wraps_logging_meanwhile_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ours is silent after its end all the same."""
    seen = []
    monkeypatch.setattr(logging.Logger, "callHandlers", logging.Logger.callHandlers)
    with Logs(Topology(), "INFO", []) as logs:
        logs.open(tmp_path)
        before = logging.Logger.callHandlers

        def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            before(self, record)

        logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign]
        get_logger("launcher.x").error("meanwhile")
    get_logger("launcher.x").error("afterwards")
    assert seen == ["meanwhile", "afterwards"]
    assert "afterwards" not in (tmp_path / "rank0.log").read_text()


def test_one_within_the_other_shows_a_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Logs(Topology(), "INFO", []) as outer, Logs(Topology(), "INFO", []) as inner:
        for name, logs in {"outer": outer, "inner": inner}.items():
            logs.open(tmp_path / name)
        get_logger("launcher.x").info("a step")
    assert capsys.readouterr().err.count("a step") == 1
    for name in ("outer", "inner"):
        assert (tmp_path / name / "rank0.log").read_text().count("a step") == 1


def test_a_logger_that_somebody_asked_for_before_is_ours_too() -> None:
    logging.getLogger("launcher.asked_for").setLevel(logging.WARNING)
    logger = get_logger("launcher.asked_for")
    assert logger is logging.getLogger("launcher.asked_for")
    logger.disabled = True
    logging.disable(logging.CRITICAL)
    try:
        assert logger.isEnabledFor(logging.WARNING) and not logger.disabled
        assert not logger.isEnabledFor(logging.INFO)
    finally:
        logging.disable(logging.NOTSET)


class Failing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("no room")


def test_a_handler_that_fails_ends_nothing_of_the_launchers_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thread of its own, or the telling of a failure, would end with it; said once. A line of the
    user's own raises as it would without us."""
    failing = Failing()
    logging.getLogger().addHandler(failing)
    try:
        with Logs(Topology(), "INFO", ["task"]) as logs:
            logs.open(tmp_path)
            for _ in range(3):
                get_logger("launcher.x").error("a failure")
            with pytest.raises(ValueError, match="no room"):
                logging.getLogger("task").error("my error")
    finally:
        logging.getLogger().removeHandler(failing)
    told = capsys.readouterr().err
    assert told.count("a handler of Python's logging failed: ValueError('no room')") == 1
    assert (tmp_path / "rank0.log").read_text().count("a failure") == 3
