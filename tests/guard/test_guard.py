"""Who tells of a failure, and what: several ranks in one process, with a store between them."""

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.errors import Ended, RunError, UsageError
from launcher.guard.board import Board, Unreachable
from launcher.guard.failure import describe
from tests.engine.helpers import config
from tests.guard.ranks import ELSEWHERE, ENDED, HERE, LOST, Gone, Ranks
from tests.waiting import wait_until

Printed = pytest.CaptureFixture[str]


def test_an_error_is_told_once_by_the_rank_that_had_it(tmp_path: Path, capfd: Printed) -> None:
    """Rank 0 finds only that its connection is gone; it writes the run's status."""
    ranks = Ranks(tmp_path, [HERE, HERE])
    ranks.codes[0] = 0  # it comes to its end by itself, below
    assert isinstance(ranks.fail(1, ValueError("a bad batch")), Ended)
    assert ranks.told["exception"] == "ValueError: a bad batch"
    assert "in fail" in ranks.told["traceback"]
    assert ranks.status["state"] == "running"
    assert isinstance(ranks.fail(0, LOST), Ended)
    ranks.assert_told(1, "ValueError: a bad batch", by=1)
    assert ranks.status["reason"] == f"rank 1 on {HERE.host}: ValueError: a bad batch"
    assert capfd.readouterr().err.count("failed first") == 1


def test_one_process_tells_of_its_own(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    assert isinstance(ranks.fail(0, RunError("no")), Ended)
    assert ranks.told["exception"] == ranks.status["reason"] == "RunError: no"


def test_a_killed_rank_0_leaves_the_writing_to_who_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel's own count says whether it was for want of memory."""
    ranks = Ranks(tmp_path, [ENDED, HERE, HERE])
    monkeypatch.setattr("launcher.guard.guard.oom_kills", lambda: 10**9)
    ranks.busy.add(1)
    ranks.fail(2, LOST)
    ranks.assert_told(0, "rank 0 was killed from outside, by the kernel for want", by=2)
    ranks.fail(1, LOST)
    ranks.assert_told(0, "rank 0 was killed", by=2)


def test_a_silent_host_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE])
    ranks.fail(0, LOST)
    ranks.assert_told(1, "its host elsewhere is down, or cannot be reached")


def test_what_the_user_must_mend_is_raised_as_it_is(tmp_path: Path, capfd: Printed) -> None:
    """Where it is at one rank alone, rank 0 tells of it: torchrun may end that rank before."""
    ranks = Ranks(tmp_path, [HERE, HERE])
    error = UsageError("no such file")
    ranks.busy.add(0)
    assert ranks.fail(1, error) is error
    assert not (ranks.run / "failure.json").exists()
    assert isinstance(ranks.fail(0, LOST), Ended)
    ranks.assert_told(1, "UsageError: no such file", by=0)
    assert "UsageError: no such file" in capfd.readouterr().err


def test_a_hang_is_told_once_with_the_stacks_of_all(tmp_path: Path, capfd: Printed) -> None:
    """Rank 1 gives no sign of life; who judges last learns of the verdict from the board."""
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE, HERE])
    ranks.stall()
    assert ranks.codes == {0: 1, 2: 1}
    ranks.assert_told(1, "gives no sign of life")
    assert ranks.told["exception"].startswith("hang: nothing has moved for ")
    assert capfd.readouterr().err.count("failed first") == 1
    for rank in (0, 2):
        assert "thread MainThread" in (ranks.run / f"logs/rank{rank}.log").read_text()


def test_the_rank_that_all_wait_for_is_told_with_its_stack(tmp_path: Path, capfd: Printed) -> None:
    ranks = Ranks(tmp_path, [HERE, HERE])
    ranks.progress.samples = 8
    ranks.guards[1].enter("step")
    ranks.guards[0].enter("evaluate")  # which may take longer
    ranks.stall()
    ranks.assert_told(1, "rank 1 (step, 0 steps done)")
    assert ranks.codes == {0: 1, 1: 1} and "in stall" in capfd.readouterr().err


def test_a_lost_store_leaves_the_word_to_who_has_it(tmp_path: Path) -> None:
    """Rank 0 is cut off: it waits for failure.json, and writes the status by it."""
    ranks = Ranks(tmp_path, [HERE, ELSEWHERE], store=Gone())
    others = {"rank": 0, "host": "x", "pid": 1, "step": 3, "exception": "hang", "traceback": ""}

    def write(code: int) -> None:
        if ranks.guards[0].phase == "end":
            ranks.run.joinpath("failure.json").write_text(json.dumps({**others, "told_by": 1}))

    tick, ranks.tick = ranks.tick, lambda rank: (write(rank), tick(rank))  # type: ignore[method-assign]
    ranks.stall()
    assert ranks.codes == {0: 1} and ranks.status["reason"] == "hang"
    ranks.assert_told(0, "hang", by=1)


@pytest.mark.parametrize("how", ["hang", "lost connection"])
def test_a_store_that_is_gone_went_with_its_host(how: str, tmp_path: Path) -> None:
    """Rank 0's; nobody tells of it, so this rank does, and writes for rank 0."""
    ranks = Ranks(tmp_path, [ELSEWHERE, HERE], store=Gone())
    if how == "hang":
        ranks.stall()
    else:
        ranks.fail(1, LOST)
    ranks.assert_told(0, "its host elsewhere is down, or cannot be reached", by=1)


def test_a_stuck_main_thread_is_ended_for_the_failure_of_another(tmp_path: Path) -> None:
    """As under NCCL, which lets a rank wait for one that is gone. Rank 1, which tells, waits for it
    to write the status."""
    ranks = Ranks(tmp_path, [HERE, HERE])
    ranks.fail(1, ValueError("a bad batch"))
    assert ranks.codes[0] == 1 and ranks.now < 20
    ranks.assert_told(1, "a bad batch")


def test_a_stuck_main_thread_is_ended_for_a_killed_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE, ENDED])
    ranks.stall(10)
    assert ranks.codes == {0: 1}
    ranks.assert_told(1, "killed from outside")


def test_who_tells_waits_for_a_rank_0_that_lives_and_only_saves(tmp_path: Path) -> None:
    """What it has open is closed first, and its main thread has the word on the run's end, however
    late; no two write it."""
    ranks = Ranks(tmp_path, [HERE, HERE])
    ranks.guards[0].enter("save")
    ranks.fail(1, ValueError("a bad batch"))
    assert ranks.status["state"] == "running" and not (ranks.run / "history.jsonl").exists()
    ranks.stall(20)
    assert 0 not in ranks.codes
    ranks.fail(0, LOST)
    ranks.assert_told(1, "a bad batch")


def test_the_first_step_may_take_longer_and_a_save_has_a_time_of_its_own(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    guard, limits = ranks.guards[0], {}
    for phase in ("start", "data", "step", "evaluate", "save"):
        guard.enter(phase)
        limits[phase] = guard.limit
    assert limits == {"start": 30, "data": 30, "step": 30, "evaluate": 25, "save": 1800}
    ranks.progress.advance(8, 80, skipped=True)
    guard.enter("step")
    assert guard.limit == 20


def test_a_frozen_process_has_not_watched_meanwhile(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE])
    ranks.now += 1000
    ranks.stall(10)
    assert not ranks.codes and ranks.guards[0].age < 12


def test_trouble_in_the_watching_ends_no_watch(
    tmp_path: Path, capfd: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and what has nothing to do with it goes on: here, to look at the time."""

    def fail(name: str, value: object) -> None:
        raise OSError("no descriptor left")

    ranks = Ranks(tmp_path, [HERE], "TRAIN.MAX_TIME", "1s")
    monkeypatch.setattr(ranks.guards[0].board, "post", fail)
    ranks.stall(2)
    assert ranks.guards[0].stop == "TRAIN.MAX_TIME 1s"
    assert capfd.readouterr().err.count("trouble in watching the run: OSError") == 1


def test_to_say_what_comes_next_never_raises(tmp_path: Path) -> None:
    """Though nobody takes what it tells, and more than a pipe holds."""
    guard = Ranks(tmp_path, [HERE]).guards[0]
    for _ in range(50_000):
        guard.enter("save")
        guard.enter("step")


def test_before_ranks_know_each_other_each_ends_with_its_stacks(
    tmp_path: Path, capfd: Printed
) -> None:
    """Say in a collective that one of them never comes to."""
    ranks = Ranks(tmp_path, [HERE], met=False)
    ranks.stall(45)
    err = capfd.readouterr().err
    assert ranks.codes == {0: 1} and not (ranks.run / "failure.json").exists()
    assert "rank 0 of 1" in err and "nothing has moved for" in err and "thread MainThread" in err


def test_short_device_memory_names_the_key_to_change() -> None:
    text = describe(torch.OutOfMemoryError("out"), config("TRAIN.BATCH_SIZE", 16), 2)
    assert "TRAIN.MICRO_BATCH_SIZE 4 needs about half the memory" in text


def test_a_board_that_has_kept_silent_once_is_not_waited_for_again() -> None:
    """Until it answers what it was asked."""
    answer = threading.Event()

    class Slow(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            answer.wait(10)
            return False

    board = Board(Slow(), 0, 1, answer_s=0.3)
    with pytest.raises(Unreachable):
        board.read("beat")
    with pytest.raises(Unreachable, match="earlier question"):
        board.read("beat")
    answer.set()

    def answers() -> bool:
        try:
            return board.read("beat") == {}
        except Unreachable:
            return False

    wait_until(answers)
    board.close()


def test_the_first_value_on_a_board_stands() -> None:
    store = dist.HashStore()
    boards = [Board(store, rank, 2) for rank in range(2)]
    assert boards[0].peek("failure") is None
    assert [board.first("failure", rank) for rank, board in enumerate(boards)] == [0, 0]
    wait_until(lambda: boards[1].peek("failure") == 0)
    boards[1].post("beat", {"x": 1})
    wait_until(lambda: boards[0].read("beat") == {1: {"x": 1}})
    for board in boards:
        board.close()
