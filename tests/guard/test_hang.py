"""Which rank is to blame for a hang, and the watch that notices it and takes the signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from launcher.runtime import hang
from launcher.runtime.topology import Topology
from launcher.runtime.watch import Watch

LIMITS = {"start": 9.0, "step": 9.0, "save": 99.0}


def beat(n: int, collectives: int, age: float, limit: float = 5.0, phase: str = "step") -> Any:
    return {"n": n, "collectives": collectives, "age": age, "limit": limit, "phase": phase}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        # Rank 1 has begun fewer collectives than the others.
        ([beat(1, 9, 1), beat(1, 8, 1)], [beat(3, 9, 6), beat(3, 8, 7)], (1, [])),
        # It does as well, but still moves.
        ([beat(1, 9, 1), beat(1, 8, 1)], [beat(3, 9, 6), beat(3, 8, 1)], None),
        # It is within the time that its phase may take.
        ([beat(1, 9, 1), beat(1, 8, 1)], [beat(3, 9, 6), beat(3, 8, 7, 60)], None),
        # It gives no sign of life; that it had begun as many collectives says nothing.
        ([beat(1, 9, 1), beat(2, 9, 0)], [beat(3, 9, 6), beat(2, 9, 0)], (1, [1])),
        # Its last word was from the start, which may take long; but the others train already.
        ([beat(1, 9, 1), beat(2, 1, 0, 600)], [beat(3, 9, 6), beat(2, 1, 0, 600)], (1, [1])),
        # It was saving, alone, which may take long.
        (
            [beat(1, 9, 1), beat(2, 9, 0, 60, "save")],
            [beat(3, 9, 6), beat(2, 9, 0, 60, "save")],
            None,
        ),
        # It never posted anything.
        ([beat(1, 9, 1)], [beat(3, 9, 6)], (1, [1])),
    ],
)
def test_judge(before: list[Any], after: list[Any], verdict: object) -> None:
    readings = dict(enumerate(before)), dict(enumerate(after))
    assert hang.judge(*readings, world_size=2, age=6.0, limit=5.0) == verdict


def test_stacks_name_the_threads_and_end_with_the_main_one() -> None:
    text = hang.stacks()
    assert text.rpartition("thread ")[2].startswith("MainThread:")
    assert "test_stacks_name_the_threads" in text and "test_stacks_name" in hang.main_stack()


def test_a_process_is_known_by_when_it_began() -> None:
    me = hang.myself()
    assert hang.is_alive(me["pid"], me["created"])
    assert not hang.is_alive(me["pid"], me["created"] - 60)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    hang.kill(process.pid, me["created"] - 60)  # another of the same number
    assert process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while "stopped" not in hang.process_state(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "stopped" in hang.process_state(process.pid)
    process.kill()
    process.wait()
    assert hang.process_state(process.pid) == f"process {process.pid} is gone"


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_is_a_stop_request_and_one_more_at_once_is_the_same() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Watch(Topology(), LIMITS).running() as watch:
        watch.started = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        wait_for(lambda: watch.stop)
        time.sleep(0.05)
        assert watch.stop == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_while_ending_is_none() -> None:
    watch = Watch(Topology(), LIMITS)
    assert watch.begin_end() and not watch.begin_end()
    watch.request_stop("SIGTERM")  # torchrun's, since another rank has failed
    assert watch.stop is None


def test_nothing_moving_for_longer_than_it_may_is_told() -> None:
    stalls: list[str] = []
    with Watch(Topology(), {"start": 60.0, "step": 0.2, "save": 60.0}).running() as watch:
        watch.on_stall = lambda: stalls.append(watch.phase)
        watch.started = True
        watch.enter("save")
        time.sleep(1.2)
        assert not stalls
        watch.enter("step")
        wait_for(lambda: stalls)
    assert set(stalls) == {"step"}


def test_a_rank_that_nobody_watches_yet_ends_with_its_stacks() -> None:
    """Before the ranks know each other, say in a collective that one of them never comes to."""
    code = (
        "import time\n"
        "from launcher.runtime import watch\n"
        "watch.GRACE_S = 0.1\n"
        "with watch.Watch(limits={'start': 0.5}).running():\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert "rank 0 of 1" in ended.stderr and "nothing has moved for" in ended.stderr
    assert "time.sleep(60)" in ended.stderr or 'File "<string>", line 5' in ended.stderr
