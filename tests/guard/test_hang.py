"""Which rank is to blame for a hang, and what can be said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launcher.guard.hang import Beat, judge, process_state, stacks
from tests.waiting import wait_until


def beat(
    number: int, collectives: int, age: float, limit: float = 5.0, phase: str = "step"
) -> Beat:
    return Beat(number, collectives, phase, 0, age, limit, 0.1)


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
def test_the_rank_that_all_wait_for(before: list[Beat], after: list[Beat], verdict: object) -> None:
    readings = dict(enumerate(before)), dict(enumerate(after))
    assert judge(*readings, world_size=2, age=6.0, limit=5.0) == verdict


def test_stacks_name_the_threads_and_end_with_the_main_one() -> None:
    *_, main = stacks().rpartition("\nthread ")
    assert main.startswith("MainThread:") and "test_stacks_name_the_threads" in main


def test_the_state_of_a_process_that_cannot_speak() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: "stopped" in process_state(process.pid))
    process.kill()
    process.wait()
    assert process_state(process.pid) == f"process {process.pid} is gone"
