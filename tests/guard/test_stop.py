"""Requests to stop; when a stop must begin, and whether it fits what torchrun grants."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.guard.stop import SAME_REQUEST_S, SLURM_SPARE_S, Signals, StopMargin, deadlines
from launcher.runtime.progress import Progress
from tests.guard.ranks import HERE, Ranks, config
from tests.waiting import wait_until


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_margin_is_the_longest_save_and_two_steps() -> None:
    progress, clock = Progress(), Clock()
    margin = StopMargin(progress, "cpu", None, clock)
    on_cuda = StopMargin(progress, "cuda", None, clock)
    margin.saved(50.0)
    margin.saved(20.0)
    clock.now, progress.step = 100.0, 10
    assert margin() == 50 + 2 * 10
    assert on_cuda() == 10 * 10  # the ranks' agreement is read later


def test_a_save_that_does_not_fit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    margin = StopMargin(Progress(), "cpu", 30.0, Clock())
    margin.saved(20.0)
    assert not caplog.records
    margin.saved(40.0)
    margin.saved(41.0)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "torchrun kills its ranks 30 s after" in record.getMessage()
    assert "--shutdown-timeout=80" in record.getMessage()


def test_srun_and_a_lone_process_have_no_such_limit(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for number, members in enumerate([[HERE], [HERE, HERE]]):
        ranks = Ranks(tmp_path / str(number), members)
        ranks.guards[0].saved(1000.0)
    assert not caplog.records


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    found = deadlines(config("TRAIN.MAX_TIME", "1h"), now=1000.0)
    assert found["Slurm's time limit"] == pytest.approx(1600 - SLURM_SPARE_S, abs=5)
    assert 1000 < found["TRAIN.MAX_TIME 1h"] <= 4600  # counted from the process's begin
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert deadlines(config(), 0.0) == {}


def test_a_time_that_is_nearly_over_is_a_request_of_rank_0(tmp_path: Path) -> None:
    progress = Progress()
    words = ["TRAIN.MAX_TIME", "2h", "DIST.INIT_TIMEOUT", "3h"]
    ranks = Ranks(tmp_path, [HERE, HERE], words=words, progress=progress)
    progress.step = 1000  # of at most 7 s each
    ranks.guards[0].saved(500.0)
    for now, reason in ((5000, None), (7190 - 500, "TRAIN.MAX_TIME 2h")):
        ranks.now = now
        ranks.sleep(0.5)
        assert [guard.stop for guard in ranks.guards.values()] == [reason, None]


def test_a_file_is_a_request(tmp_path: Path) -> None:
    (guard,) = Ranks(tmp_path, [HERE]).guards.values()
    guard.look_for_stop_file()
    assert guard.stop is None
    guard.directory.stop.touch()
    guard.look_for_stop_file()
    assert guard.stop == "file STOP"


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


def test_a_request_while_ending_is_none(tmp_path: Path) -> None:
    """torchrun's, since another rank has failed."""
    (guard,) = Ranks(tmp_path, [HERE]).guards.values()
    guard.enter("end")
    guard.request_stop("SIGTERM")
    assert guard.stop is None


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


@pytest.mark.parametrize(
    ("arguments", "env", "seconds"),
    [
        ([], {}, 30),
        ([], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90),
        (["--shutdown-timeout=120"], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 120),
        (["--shutdown_timeout", "45"], {}, 45),
    ],
)
def test_what_torchrun_grants(arguments: list[str], env: dict[str, str], seconds: int) -> None:
    """Read from its command line, which a rank sees as its parent's."""
    child = f"from launcher.guard.stop import shutdown_timeout; print(shutdown_timeout({env}))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(found.stdout) == seconds
