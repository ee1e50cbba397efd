"""The run directory: what it holds, whether it can be written, its small files."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.runtime.member import Member
from launcher.telemetry.rundir import BEAT_S, STALE_S, RunDirectory, replace_json

HERE = {"step": 3, "epoch": 1, "samples": 24}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    return directory


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl", "checkpoints/"])
def test_any_trace_of_a_run_is_one(run: RunDirectory, name: str) -> None:
    path = run.path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert run.holds_run()


def test_an_empty_directory_or_other_files_are_no_run(run: RunDirectory) -> None:
    assert not RunDirectory(run.path / "absent").holds_run()
    assert not run.holds_run()
    (run.path / "notes.txt").touch()
    (run.path / "logs").mkdir()
    assert not run.holds_run()


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


def test_status(run: RunDirectory) -> None:
    assert run.read_status() == {}
    run.write_status("running", HERE)
    run.write_status("failed", HERE, "ValueError: x")
    status = run.read_status()
    assert set(status) == {"state", "step", "epoch", "reason", "host", "pid", "updated"}
    assert (status["state"], status["step"], status["epoch"]) == ("failed", 3, 1)
    assert (status["reason"], status["pid"]) == ("ValueError: x", os.getpid())


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_status_that_cannot_be_read_is_none(run: RunDirectory, text: str) -> None:
    run.status.write_bytes(text.encode("latin-1"))
    assert run.read_status() == {}


def test_small_files_are_replaced_whole(run: RunDirectory) -> None:
    """A reader with the old file open still sees the old one; nothing else is left behind."""
    run.write_status("running", HERE)
    with run.status.open() as old:
        inode = os.fstat(old.fileno()).st_ino
        run.write_status("completed", HERE)
        assert json.load(old)["state"] == "running"
    assert run.status.stat().st_ino != inode
    assert os.listdir(run.path) == ["status.json"]


def test_a_failing_write_leaves_the_old_file(run: RunDirectory) -> None:
    run.write_status("running", HERE)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError):
        replace_json(run.status, loop)
    assert run.read_status()["state"] == "running"


def test_history_is_appended(run: RunDirectory) -> None:
    run.write_history("start", 0, world_size=2)
    run.write_history("checkpoint", 40, path=Path("step_40"), seconds=0.5)
    start, saved = map(json.loads, run.history.read_text().splitlines())
    assert (start["event"], start["step"], start["world_size"]) == ("start", 0, 2)
    assert (saved["event"], saved["step"], saved["path"]) == ("checkpoint", 40, "step_40")
    assert start["time"] <= saved["time"]


# Claims argv[1], says so and sleeps; with a second argument a forked child outlives it.
OWNER = """
import os, sys, time
from launcher.telemetry.rundir import RunDirectory
run = RunDirectory(sys.argv[1])
run.begin()
child = 0
if len(sys.argv) > 2 and (child := os.fork()) == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def start_owner(run: RunDirectory, *more: str) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the claim, and its child's pid."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run.path), *more], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    return owner, int(owner.stdout.readline())


def test_a_live_owner_is_named_and_a_dead_ones_claim_is_taken_over(run: RunDirectory) -> None:
    owner, _ = start_owner(run)
    try:
        with pytest.raises(UsageError, match="in use by another job") as caught:
            run.claim()
        for told in (f"host {socket.gethostname()}", f"pid {owner.pid}", str(run.path)):
            assert told in str(caught.value)
        assert caught.value.exit_code == 2
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    run.begin()
    assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
    run.claim()  # what one has, one may claim
    run.release()


def test_an_owner_that_leaves_is_waited_for(run: RunDirectory) -> None:
    owner, _ = start_owner(run)
    began = time.monotonic()
    with pytest.raises(UsageError, match=f"pid {owner.pid}"):
        run.claim(wait_s=0.5)
    assert time.monotonic() - began >= 0.5
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {owner.pid}"])
    try:
        run.claim(wait_s=20)
    finally:
        killer.wait()
        owner.kill()
        owner.communicate()
    run.release()


def test_a_forked_child_does_not_inherit_the_claim(run: RunDirectory) -> None:
    """Loader workers may outlive a killed rank for a while; the run's successor must not wait."""
    owner, child = start_owner(run, "fork")
    try:
        with pytest.raises(UsageError, match=f"pid {owner.pid}"):
            run.claim()
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # it lives
        run.claim()
        run.release()
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)
        owner.communicate()


def test_a_released_claim_can_be_taken_by_another_process(run: RunDirectory) -> None:
    run.claim()
    run.release()
    owner, _ = start_owner(run)
    owner.kill()
    owner.communicate()


def fill(run: RunDirectory, **contents: bytes) -> None:
    run.tensorboard.mkdir(exist_ok=True)
    run.metrics.write_bytes(contents["metrics"])
    (run.tensorboard / "events.out.tfevents.1.host").write_bytes(contents["events"])


def test_rewind_cuts_back_to_the_positions_and_keeps_the_tails(run: RunDirectory) -> None:
    fill(run, metrics=b"one\ntwo\n", events=b"EVENTS")
    positions = run.positions()
    assert positions == {"metrics.jsonl": 8, "tensorboard/events.out.tfevents.1.host": 6}
    fill(run, metrics=b"one\ntwo\nthree\nfo", events=b"EVENTS-and-more")
    later = run.tensorboard / "events.out.tfevents.2.host"
    later.write_bytes(b"of an attempt that came to nothing")
    run.rewind(positions, 20, {40: "state.pt: cut"})
    assert run.metrics.read_bytes() == b"one\ntwo\n"
    assert run.rewound.read_bytes() == b"three\nfo"
    assert (run.tensorboard / "events.out.tfevents.1.host").read_bytes() == b"EVENTS"
    assert not later.exists()
    asides = {p.name: p.read_bytes() for p in (run.path / "tensorboard.rewound").iterdir()}
    assert asides == {
        "events.out.rewound.1.host": b"-and-more",
        "events.out.rewound.2.host": b"of an attempt that came to nothing",
    }
    # TensorBoard reads every file below its directory whose name says so, wherever it is told to.
    assert not [p for p in run.path.rglob("*tfevents*") if p.parent != run.tensorboard]
    (told,) = map(json.loads, run.history.read_text().splitlines())
    assert (told["event"], told["step"]) == ("rewind", 20)
    assert told["damaged"] == {"step_40": "state.pt: cut"}
    assert told["bytes"] == len(b"three\nfo-and-moreof an attempt that came to nothing")


def test_a_second_rewind_appends_to_the_tails(run: RunDirectory) -> None:
    fill(run, metrics=b"one\n", events=b"E")
    positions = run.positions()
    for tail in (b"two\n", b"2\n"):
        fill(run, metrics=b"one\n" + tail, events=b"E" + tail)
        run.rewind(positions, 1, {})
    assert run.metrics.read_bytes() == b"one\n"
    assert run.rewound.read_bytes() == b"two\n2\n"
    (aside,) = (run.path / "tensorboard.rewound").iterdir()
    assert aside.read_bytes() == b"two\n2\n"


def test_a_rewind_of_nothing_changes_nothing(run: RunDirectory) -> None:
    fill(run, metrics=b"one\n", events=b"E")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    run.rewind(run.positions(), 1, {})
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_an_evaluation_is_a_file_of_its_own(run: RunDirectory) -> None:
    run.write_evaluation({"step": 3, "metrics": {"val/loss": 0.5}})
    (path,) = run.evaluations.iterdir()
    assert path.suffix == ".json"
    assert json.loads(path.read_text()) == {"step": 3, "metrics": {"val/loss": 0.5}}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_that_took_anothers_number_is_not_the_owner(
    run: RunDirectory,
) -> None:
    """As in a container that takes another's place: the same host name, and the same pids."""
    owner = asdict(Member.here())
    run.lock.write_text(json.dumps(owner))
    with pytest.raises(UsageError, match=f"in use by another job .*pid {os.getpid()}"):
        run.claim()
    run.lock.write_text(json.dumps({**owner, "created": owner["created"] - 100}))
    run.claim()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_owner_on_another_host_is_dead_when_it_is_silent(
    run: RunDirectory,
) -> None:
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "created": 1.0}))
    for updated, free in ((time.time(), False), (time.time() - STALE_S - 1, True)):
        run.status.write_text(json.dumps({"state": "running", "updated": updated}))
        if free:
            run.claim()
        else:
            with pytest.raises(UsageError, match="host elsewhere, pid 1"):
                run.claim()


def test_a_heartbeat_is_written_now_and_then_while_the_run_goes_on(run: RunDirectory) -> None:
    run.heartbeat(HERE)
    assert run.read_status() == {}  # it has not begun
    run.write_status("running", HERE)
    run.heartbeat({**HERE, "step": 4})
    assert run.read_status()["step"] == 3  # too soon
    run._status["updated"] -= BEAT_S
    run.heartbeat({**HERE, "step": 5})
    assert (run.read_status()["step"], run.read_status()["state"]) == (5, "running")
    run.write_status("completed", HERE)
    run._status["updated"] -= BEAT_S
    run.heartbeat(HERE)
    assert run.read_status()["state"] == "completed"


FAILURE = {"rank": 1, "exception": "ValueError: x"}


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_the_first_failure_stays(
    run: RunDirectory, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert run.create_failure(FAILURE) is True
    assert run.create_failure({"rank": 2}) is False
    assert json.loads(run.failure.read_text()) == FAILURE
    assert os.listdir(run.path) == ["failure.json"]


def test_many_ranks_fail_and_one_of_them_is_the_first(run: RunDirectory) -> None:
    children = []
    for rank in range(16):
        if (child := os.fork()) == 0:
            os._exit(run.create_failure({"rank": rank, "log": ["x" * 1000] * 100}))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(codes) == 1
    assert json.loads(run.failure.read_text())["rank"] == codes.index(1)
    assert os.listdir(run.path) == ["failure.json"]


def test_a_failure_that_cannot_be_written_is_told(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    run.path.rmdir()
    assert run.create_failure(FAILURE) is True
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
