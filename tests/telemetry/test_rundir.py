"""The run directory: what it holds, whether it can be written, its small files."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from launcher.errors import UsageError
from launcher.runtime.member import Member
from launcher.telemetry.rundir import BEAT_S, STALE_S, RunDirectory, replace_json
from tests.telemetry.helpers import exit_code, fork

HERE = {"step": 3, "epoch": 1, "samples": 24}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    return directory


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl", "checkpoints/"])
def test_any_trace_of_a_run_is_one_and_other_files_are_none(run: RunDirectory, name: str) -> None:
    assert not RunDirectory(run.path / "absent").holds_run() and not run.holds_run()
    (run.path / "notes.txt").touch()
    (run.path / "logs").mkdir()
    assert not run.holds_run()
    path = run.path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert run.holds_run()


def test_set_aside_twice_within_a_second_loses_nothing(run: RunDirectory) -> None:
    asides = []
    for i in range(4):
        run.claim()
        run.config.write_text(str(i))
        asides.append(run.set_aside())
        assert not run.path.exists()
    assert [(aside / "config.yaml").read_text() for aside in asides] == list("0123")
    assert all(aside.name.startswith("run.old-2") for aside in asides)
    assert all(aside.parent == run.path.parent for aside in asides)


def test_a_claim_tells_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"OUTPUT_DIR .* cannot be made"):
        RunDirectory(tmp_path / "file" / "run").claim()


def test_the_status_is_written_now_and_then_while_the_run_goes_on(run: RunDirectory) -> None:
    run.heartbeat(HERE)
    assert run.read_status() == {}  # it has not begun
    run.write_status("running", HERE)
    run.heartbeat({**HERE, "step": 4})
    assert run.read_status()["step"] == 3  # too soon
    run._status["updated"] -= BEAT_S
    run.heartbeat({**HERE, "step": 5})
    assert (run.read_status()["step"], run.read_status()["state"]) == (5, "running")
    run.write_status("failed", HERE, "ValueError: x")
    run._status["updated"] -= BEAT_S
    run.heartbeat({**HERE, "step": 6})
    status = run.read_status()
    assert set(status) == {"state", "step", "epoch", "reason", "host", "pid", "updated"}
    assert (status["state"], status["step"], status["epoch"]) == ("failed", 3, 1)
    assert (status["reason"], status["pid"]) == ("ValueError: x", os.getpid())


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_status_that_cannot_be_read_is_none(run: RunDirectory, text: str) -> None:
    run.status.write_bytes(text.encode("latin-1"))
    assert run.read_status() == {}


def test_small_files_are_replaced_whole_or_not_at_all(run: RunDirectory) -> None:
    """A reader with the old file open still sees the old one; nothing else is left behind."""
    run.write_status("running", HERE)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError):
        replace_json(run.status, loop)
    assert run.read_status()["state"] == "running"
    with run.status.open() as old:
        inode = os.fstat(old.fileno()).st_ino
        run.write_status("completed", HERE)
        assert json.load(old)["state"] == "running"
    assert run.status.stat().st_ino != inode
    assert os.listdir(run.path) == ["status.json"]


def test_history_is_appended(run: RunDirectory) -> None:
    run.write_history("start", 0, world_size=2)
    run.write_history("checkpoint", 40, path=Path("step_40"), seconds=0.5)
    start, saved = map(json.loads, run.history.read_text().splitlines())
    assert (start["event"], start["step"], start["world_size"]) == ("start", 0, 2)
    assert (saved["event"], saved["step"], saved["path"]) == ("checkpoint", 40, "step_40")
    assert start["time"] <= saved["time"]


# Claims argv[1] and has a child, as a loader worker, that may outlive it.
OWNER = """
import os, sys, time
from launcher.telemetry.rundir import RunDirectory
run = RunDirectory(sys.argv[1])
run.begin()
if os.fork():
    print("begun", flush=True)
time.sleep(60)
"""
Start = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def start_owner(run: RunDirectory) -> Iterator[Start]:
    """Starts processes that hold the claim; they and their children are ended."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", OWNER, str(run.path)], subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True))
        assert started[-1].stdout and started[-1].stdout.readline() == "begun\n"
        return started[-1]

    yield start
    for owner in started:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.communicate()


def test_a_live_owner_is_named_and_a_dead_ones_claim_is_taken_over(
    run: RunDirectory, start_owner: Start
) -> None:
    """Also while its loader workers are alive: they do not inherit the claim."""
    owner = start_owner()
    (child,) = psutil.Process(owner.pid).children()
    with pytest.raises(UsageError, match="in use by another job") as caught:
        run.claim()
    for told in (f"host {socket.gethostname()}", f"pid {owner.pid}", str(run.path)):
        assert told in str(caught.value)
    assert caught.value.exit_code == 2
    owner.kill()
    owner.wait()
    assert child.is_running()
    run.begin()
    assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
    run.claim()  # what one has, one may claim
    run.release()
    start_owner()  # as another process may, then


def test_an_owner_that_leaves_is_waited_for(run: RunDirectory, start_owner: Start) -> None:
    owner, began = start_owner(), time.monotonic()
    with pytest.raises(UsageError, match=f"pid {owner.pid}"):
        run.claim(wait_s=0.5)
    assert time.monotonic() - began >= 0.5
    threading.Timer(0.5, owner.kill).start()
    run.claim(wait_s=20)
    run.release()


def fill(run: RunDirectory, metrics: bytes, events: bytes) -> None:
    run.tensorboard.mkdir(exist_ok=True)
    run.metrics.write_bytes(metrics)
    (run.tensorboard / "events.out.tfevents.1.host").write_bytes(events)


def files(run: RunDirectory) -> dict[str, bytes]:
    paths = [path for path in run.path.rglob("*") if path.is_file() and path != run.history]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def test_rewind_cuts_back_to_the_positions_and_keeps_the_tails(run: RunDirectory) -> None:
    fill(run, b"one\ntwo\n", b"EVENTS")
    positions, kept = run.positions(), files(run)
    assert positions == {"metrics.jsonl": 8, "tensorboard/events.out.tfevents.1.host": 6}
    run.rewind(positions, 10, {})  # there is nothing to cut
    assert files(run) == kept and not run.history.exists()
    fill(run, b"one\ntwo\nthree\nfo", b"EVENTS-and-more")
    (run.tensorboard / "events.out.tfevents.2.host").write_bytes(b"of an attempt in vain")
    run.rewind(positions, 20, {40: "state.pt: cut"})
    (told,) = map(json.loads, run.history.read_text().splitlines())
    assert (told["event"], told["step"]) == ("rewind", 20)
    assert told["damaged"] == {"step_40": "state.pt: cut"}
    assert told["bytes"] == len(b"three\nfo-and-moreof an attempt in vain")
    fill(run, b"one\ntwo\n2\n", b"EVENTS2")
    run.rewind(positions, 20, {})
    # TensorBoard reads every file below its directory whose name says so, wherever it is told to.
    assert files(run) == {
        **kept,
        "metrics.rewound.jsonl": b"three\nfo2\n",
        "tensorboard.rewound/events.out.rewound.1.host": b"-and-more2",
        "tensorboard.rewound/events.out.rewound.2.host": b"of an attempt in vain",
    }


def test_an_evaluation_is_a_file_of_its_own(run: RunDirectory) -> None:
    run.write_evaluation({"step": 3, "metrics": {"val/loss": 0.5}})
    (path,) = run.evaluations.iterdir()
    assert path.suffix == ".json"
    assert json.loads(path.read_text()) == {"step": 3, "metrics": {"val/loss": 0.5}}


ME, ELSEWHERE = asdict(Member.here()), {"host": "elsewhere", "pid": 1, "created": 1.0}
SILENT = STALE_S + 1


@pytest.mark.parametrize(
    ("owner", "silent_s", "named"),
    [
        pytest.param(ME, SILENT, f"pid {os.getpid()}", id="alive"),
        # As in a container that takes another's place: the same host name, and the same pids.
        pytest.param({**ME, "created": ME["created"] - 100}, 0, None, id="another with its pid"),
        pytest.param(ELSEWHERE, 0, "host elsewhere, pid 1", id="on another host"),
        pytest.param(ELSEWHERE, SILENT, None, id="on another host and silent"),
    ],
)
def test_on_a_file_system_without_locks_the_owners_own_word_has_to_do(
    owner: dict[str, Any],
    silent_s: float,
    named: str | None,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr("fcntl.lockf", refused)
    run.lock.write_text(json.dumps(owner))
    run.status.write_text(json.dumps({"state": "running", "updated": time.time() - silent_s}))
    if named is None:
        run.claim()
    else:
        with pytest.raises(UsageError, match=f"in use by another job .*{named}"):
            run.claim()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_ranks_that_fail_the_first_ones_failure_stays(
    links: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links."""
    if not links:
        refused = Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
        monkeypatch.setattr(os, "link", refused)
    failures = [{"rank": rank, "log": ["x" * 1000] * 100} for rank in range(16)]
    ranks = [fork(lambda failure=failure: run.create_failure(failure)) for failure in failures]
    first = [exit_code(rank) for rank in ranks]
    assert sum(first) == 1 and run.create_failure({"rank": 16}) is False
    assert json.loads(run.failure.read_text()) == failures[first.index(1)]
    assert os.listdir(run.path) == ["failure.json"]


def test_a_failure_that_cannot_be_written_is_told(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    run.path.rmdir()
    assert run.create_failure({"rank": 1}) is True
    assert "failure.json could not be written" in caplog.text


def test_what_was_an_earlier_attempts_is_none_of_the_next(run: RunDirectory) -> None:
    """Its request to stop is gone, its failure stands aside."""
    for number in range(2):
        run.stop.touch()
        assert run.create_failure({"rank": number})
        run.begin()
        assert not run.stop.exists() and not run.failure.exists()
    old = run.path.glob("failure-2*.json")
    assert {json.loads(path.read_text())["rank"] for path in old} == {0, 1}
