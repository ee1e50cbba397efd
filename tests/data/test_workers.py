"""Loader workers and compute threads from a rank's CPU budget."""

from typing import Any

import pytest
import torch

from launcher.data.datasets import TensorData
from launcher.data.workers import choose_workers
from launcher.runtime.cpu import CpuBudget

WHOLE = TensorData(torch.arange(3))
SLOW = [1, 2, 3]


def budget(per_rank: int) -> CpuBudget:
    return CpuBudget(64, 8, per_rank, "cgroup quota; host has 64")


@pytest.mark.parametrize(
    ("wanted", "datasets", "per_rank", "on_cpu", "count", "threads"),
    [
        (5, [WHOLE, WHOLE], 2, True, 5, 1),  # a user's value wins, even over the budget
        (0, [SLOW, SLOW], 8, False, 0, 8),
        (-1, [WHOLE, WHOLE], 8, True, 0, 8),
        (-1, [SLOW, WHOLE], 8, True, 4, 4),
        (-1, [WHOLE, SLOW], 8, False, 7, 1),
        (-1, [SLOW, SLOW], 1, True, 0, 1),
        (-1, [SLOW, SLOW], 1, False, 0, 1),
    ],
)
def test_count_and_threads(
    wanted: int, datasets: list[Any], per_rank: int, on_cpu: bool, count: int, threads: int
) -> None:
    workers = choose_workers(wanted, datasets, budget(per_rank), 2, on_cpu)
    assert (workers.count, workers.threads) == (count, threads)


@pytest.mark.parametrize("per_rank", range(1, 20))
@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_chosen_fits_in_the_budget(per_rank: int, on_cpu: bool) -> None:
    workers = choose_workers(-1, [SLOW], budget(per_rank), 2, on_cpu)
    assert workers.count + workers.threads <= max(per_rank, 1)


@pytest.mark.parametrize(
    ("wanted", "per_rank", "ranks", "reason"),
    [
        (-1, 4, 2, "2 workers a rank: 8 usable CPUs (cgroup quota; host has 64), 2 local ranks"),
        (-1, 2, 1, "1 worker a rank: 8 usable CPUs (cgroup quota; host has 64), 1 local rank"),
        (3, 4, 2, "3 workers a rank: DATALOADER.NUM_WORKERS"),
    ],
)
def test_the_reason_for_the_log(wanted: int, per_rank: int, ranks: int, reason: str) -> None:
    assert choose_workers(wanted, [SLOW], budget(per_rank), ranks, True).reason == reason
