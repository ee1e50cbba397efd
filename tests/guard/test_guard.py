"""Who tells of a failure, and what: several ranks in one process, with a store between them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.engine import failure
from launcher.engine.failure import Failures, FirstFailure
from launcher.runtime import hang
from launcher.runtime.board import Board, Unreachable
from launcher.runtime.cpu import cpu_budget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from launcher.runtime.watch import Watch
from launcher.telemetry.rundir import RunDirectory
from tests.engine.helpers import config

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")


class Left(BaseException):
    """In place of the process's end."""


class Gone(dist.Store):
    """A store that does not answer."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("no route to host")

    set = compare_set = get = multi_get = check  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SILENT_S", "STACKS_S", "WRITTEN_S"):
        monkeypatch.setattr(failure, name, 0.3)
    monkeypatch.setattr(failure, "BEAT_S", 0.25)

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(failure, "leave", leave)
    monkeypatch.setattr(failure.telling, "tell_torchrun", lambda error: None)


def make(tmp_path: Path, store: dist.Store, members: list[dict[str, Any]]) -> list[Failures]:
    """Those of each rank. All ranks are this very process, unless `members` says otherwise."""
    ranks = []
    for rank in range(len(members)):
        topology = Topology(rank, rank, len(members), len(members), launched_by="torchrun")
        watch = Watch(topology, {"start": 1.0, "step": 1.0})
        board = Board(store, rank, len(members))
        runtime = Runtime(topology, torch.device("cpu"), cpu_budget(1), watch, board)
        made = Failures(runtime, RunDirectory(tmp_path / "run"), members, config())
        made.opened = True
        ranks.append(made)
    directory = ranks[0].directory
    directory.logs.mkdir(parents=True)
    directory.begin()
    owner = {key: members[0][key] for key in ("host", "pid")}
    directory.status.write_text(json.dumps({"state": "running", **owner}))
    return ranks


def told(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run/failure.json").read_text())


def histories(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]


ELSEWHERE = {"host": "elsewhere", "pid": 1, "created": 0.0}
# A process that has been on this host.
ENDED = {**hang.myself(), "pid": os.getpid(), "created": 1.0}


def test_an_error_is_told_once_by_rank_0(tmp_path: Path) -> None:
    first, second = make(tmp_path, dist.HashStore(), [hang.myself()] * 2)
    error = ValueError("a bad batch")
    assert second.failed(error) is error
    assert not (tmp_path / "run/failure.json").exists()  # rank 0 lives, and is to write
    found = first.failed(LOST)
    assert isinstance(found, FirstFailure) and "ValueError: a bad batch" in str(found)
    assert told(tmp_path)["rank"] == 1 and "silent" not in told(tmp_path)
    assert [record["rank"] for record in histories(tmp_path)] == [1]


def test_a_killed_rank_0_leaves_the_writing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel's own count says whether it was for want of memory."""
    ranks = make(tmp_path, dist.HashStore(), [ENDED, hang.myself(), hang.myself()])
    monkeypatch.setattr(failure, "oom_kills", lambda: ranks[1].oom_kills + 1)
    assert "rank 0 was killed from outside" in str(ranks[2].failed(LOST))
    assert not (tmp_path / "run/failure.json").exists()
    ranks[1].failed(LOST)
    assert told(tmp_path)["rank"] == 0
    assert "by the kernel for want of memory" in told(tmp_path)["exception"]
    assert len(histories(tmp_path)) == 1


def test_a_silent_host_is_named(tmp_path: Path) -> None:
    first, _ = make(tmp_path, dist.HashStore(), [hang.myself(), ELSEWHERE])
    first.failed(LOST)
    assert told(tmp_path)["rank"] == 1
    assert "its host elsewhere is down, or cannot be reached" in told(tmp_path)["exception"]


def stall(ranks: list[Failures]) -> list[int]:
    """Let nothing move on these ranks until each has left; their exit codes."""
    codes: list[int] = []
    for made in ranks:
        made.runtime.watch.started, made.runtime.watch.age = True, 5.0
    deadline = time.monotonic() + 30
    while len(codes) < len(ranks):
        assert time.monotonic() < deadline
        for made in ranks:
            if made.runtime.watch.phase == "end":
                continue
            try:
                made._tick()
                made._stall()
            except Left as left:
                codes.append(left.args[0])
        time.sleep(0.02)
    return codes


def test_a_hang_is_told_once_with_the_stacks_of_all(tmp_path: Path) -> None:
    """Rank 1 gives no sign of life; rank 2 learns of the verdict from the board."""
    ranks = make(tmp_path, dist.HashStore(), [hang.myself(), ELSEWHERE, hang.myself()])
    assert stall([ranks[0], ranks[2]]) == [1, 1]
    found = told(tmp_path)
    assert found["rank"] == 1 and "gives no sign of life" in found["exception"]
    assert found["exception"].startswith("hang: nothing has moved for 5 s")
    assert len(histories(tmp_path)) == 1
    for rank in (0, 2):
        assert "thread MainThread" in (tmp_path / f"run/logs/rank{rank}.log").read_text()


def test_a_store_that_does_not_answer_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on rank 0's host, so that is who the others wait for."""
    monkeypatch.setattr("launcher.runtime.board.ANSWER_S", 0.3)
    ranks = make(tmp_path, Gone(), [ELSEWHERE, hang.myself()])
    ranks[0].directory.release()
    assert stall([ranks[1]]) == [1]
    assert told(tmp_path)["rank"] == 0


def test_a_stuck_main_thread_is_ended_for_the_failure_of_another(tmp_path: Path) -> None:
    """As under NCCL, which lets a rank wait for one that is gone."""
    first, second = make(tmp_path, dist.HashStore(), [hang.myself()] * 2)
    second.failed(ValueError("a bad batch"))
    first.runtime.watch.age = 5.0
    deadline = time.monotonic() + 30
    with pytest.raises(Left):
        while time.monotonic() < deadline:
            first._tick()
            time.sleep(0.02)
    assert told(tmp_path)["rank"] == 1 and "a bad batch" in told(tmp_path)["exception"]


def test_a_rank_that_saves_is_not_stuck(tmp_path: Path) -> None:
    """What it has open is closed first: its main thread has the word."""
    first, second = make(tmp_path, dist.HashStore(), [hang.myself()] * 2)
    second.failed(ValueError("a bad batch"))
    first.runtime.watch.age = 5.0
    first.runtime.watch.phase = "save"
    for _ in range(40):  # several beats: the first one asks the board, the next has its answer
        first._tick()
        time.sleep(0.02)
    first.failed(LOST)
    assert told(tmp_path)["rank"] == 1 and len(histories(tmp_path)) == 1


def test_a_board_that_has_kept_silent_once_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until it answers what it was asked."""
    monkeypatch.setattr("launcher.runtime.board.ANSWER_S", 0.3)
    answer = threading.Event()

    class Slow(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            answer.wait(10)
            return False

    board = Board(Slow(), 0, 1)
    with pytest.raises(Unreachable):
        board.seen("failure")
    monkeypatch.setattr("launcher.runtime.board.ANSWER_S", 100.0)
    with pytest.raises(Unreachable, match="earlier question"):
        board.seen("failure")
    answer.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(Unreachable):
            assert board.seen("failure") is None
            break
        time.sleep(0.01)
    else:
        pytest.fail("it never answers again")
    board.close()


def test_one_rank_writes_though_two_think_that_it_is_theirs(tmp_path: Path) -> None:
    """Rank 1 takes rank 0 for silent, but rank 0 is writing already."""
    first, second = make(tmp_path, dist.HashStore(), [hang.myself()] * 2)
    assert first._is_writer({"silent": []})
    assert not second._is_writer({"silent": [0]})


def test_a_store_that_is_gone_went_with_its_host(tmp_path: Path) -> None:
    """The one who finds its connections closed is not to blame for it."""
    ranks = make(tmp_path, Gone(), [ELSEWHERE, hang.myself()])
    ranks[0].directory.release()
    ranks[1].failed(LOST)
    assert told(tmp_path)["rank"] == 0
    assert "its host elsewhere is down, or cannot be reached" in told(tmp_path)["exception"]
