"""Which rank is to blame for a hang, and what can be said of it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
        pytest.param(beat(1, 8, 1), beat(3, 8, 7), (1, []), id="it has begun fewer collectives"),
        pytest.param(beat(1, 8, 1), beat(3, 8, 1), None, id="so it has, but it still moves"),
        pytest.param(beat(1, 8, 1), beat(3, 8, 7, 60), None, id="its phase may take longer"),
        # That it had begun as many collectives says nothing.
        pytest.param(beat(2, 9, 0), beat(2, 9, 0), (1, [1]), id="it gives no sign of life"),
        # But the others train already.
        pytest.param(beat(2, 1, 0, 600), beat(2, 1, 0, 600), (1, [1]), id="it was to start"),
        pytest.param(beat(2, 9, 0, 60, "save"), beat(2, 9, 0, 60, "save"), None, id="it saves"),
        pytest.param(None, None, (1, [1]), id="it never posted anything"),
    ],
)
def test_rank_1_for_which_rank_0_waits(
    before: Beat | None, after: Beat | None, verdict: object
) -> None:
    first, second = {0: beat(1, 9, 1)}, {0: beat(3, 9, 6)}
    if before and after:
        first[1], second[1] = before, after
    assert judge(first, second, world_size=2, age=6.0, limit=5.0) == verdict


def test_stacks_name_the_threads_and_end_with_the_main_one() -> None:
    with ThreadPoolExecutor(1, "another") as pool:
        pool.submit(int)
        others, _, main = stacks().rpartition("\nthread ")
    assert "thread another_0:" in others
    assert main.startswith("MainThread:") and "test_stacks_name_the_threads" in main


def test_the_state_of_a_process_that_cannot_speak() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: "stopped" in process_state(process.pid))
    process.kill()
    process.wait()
    assert process_state(process.pid) == f"process {process.pid} is gone"
