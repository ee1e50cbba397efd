"""Requests to stop, and when a stop must begin."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.guard.stop import SAME_REQUEST_S, SLURM_SPARE_S, Signals, StopMargin, deadlines
from launcher.runtime.progress import Progress
from tests.engine.helpers import config
from tests.guard.ranks import HERE, Ranks
from tests.waiting import wait_until


def test_the_margin_is_the_longest_save_and_two_steps() -> None:
    progress, clock = Progress(), SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    margin, on_cuda = StopMargin(progress, "cpu", clock), StopMargin(progress, "cuda", clock)
    margin.longest_save_s = 50.0
    clock.now, progress.step = 100.0, 10
    assert margin() == 50 + 2 * 10
    assert on_cuda() == 10 * 10  # the ranks' agreement is read later


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    found = deadlines(config("TRAIN.MAX_TIME", "1h"), now=1000.0)
    assert found["Slurm's time limit"] == pytest.approx(1600 - SLURM_SPARE_S, abs=5)
    assert 1000 < found["TRAIN.MAX_TIME 1h"] <= 4600  # counted from the process's begin
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert deadlines(config(), 0.0) == {}


def test_a_time_that_is_nearly_over_is_a_request_of_rank_0(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [HERE, HERE], "TRAIN.MAX_TIME", "2h", "DIST.INIT_TIMEOUT", "3h")
    ranks.progress.step = 1000  # of at most 7 s each
    ranks.guards[0].saved(500.0)
    for now, reason in ((5000, None), (7190 - 500, "TRAIN.MAX_TIME 2h")):
        ranks.now = now
        ranks.sleep(0.5)
        assert [guard.stop for guard in ranks.guards.values()] == [reason, None]


@pytest.mark.parametrize(("phase", "reason"), [("step", "file STOP"), ("end", None)])
def test_a_file_is_a_request_but_none_is_taken_while_ending(
    tmp_path: Path, phase: str, reason: str | None
) -> None:
    guard = Ranks(tmp_path, [HERE]).guards[0]
    guard.enter(phase)
    guard.look_for_stop_file()
    assert guard.stop is None
    guard.directory.stop.touch()
    guard.look_for_stop_file()
    assert guard.stop == reason


def test_a_signal_is_a_request_another_at_once_the_same_and_a_later_one_leaves(
    tmp_path: Path,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    codes: list[int] = []
    with Signals() as signals:
        ranks = Ranks(tmp_path, [HERE], signals=signals, leave=codes.append)
        with ranks.guards[0] as guard:
            wait_until(lambda: signals.awaited)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            wait_until(lambda: guard.stop is not None)
            ranks.now += SAME_REQUEST_S
            assert guard.stop == "SIGTERM" and not codes
            ranks.now += 0.1
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: codes)
            assert codes == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_nobody_waits_for_yet_ends_the_process_as_resumable() -> None:
    code = (
        "import os, signal\n"
        "from launcher.guard.stop import Signals\n"
        "with Signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75 and "SIGTERM: stopped before the first step" in ended.stderr
