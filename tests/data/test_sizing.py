"""Loader workers, compute threads and pinned memory, from the budgets of CPU and memory."""

from pathlib import Path
from typing import Any

import pytest

from launcher.data.sizing import Batch, LoaderSize, size_loader, threads_set_by_user
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.memory import MemoryBudget

GIB, MIB = 2**30, 2**20
SLOW = Batch(0.05, MIB, 1000)
PLENTY = MemoryBudget(64 * GIB, 64 * GIB, 32 * GIB, False, "free memory")


def memory(available: int = 64 * GIB, shm: int | None = 32 * GIB, swaps: bool = False) -> Any:
    return MemoryBudget(available, 64 * GIB, shm, swaps, "cgroup memory limit")


def size(wanted: int = -1, per_rank: int = 8, ranks: int = 2, **more: Any) -> LoaderSize:
    options: dict[str, Any] = {
        "prefetch": 2,
        "pin": "auto",
        "memory": PLENTY,
        "cuda": False,
        "batch": SLOW,
        "own_memory": 100 * MIB,
    }
    options |= more
    cpu = CpuBudget(64, per_rank * ranks, per_rank, "cgroup quota; host has 64")
    return size_loader(wanted, cpu=cpu, local_ranks=ranks, **options)


@pytest.mark.parametrize(
    ("wanted", "per_rank", "more", "workers", "threads"),
    [
        (5, 2, {}, 5, 1),  # a user's value wins, even over the budget
        (5, 2, {"in_memory": True, "memory": memory(MIB, MIB)}, 5, 1),
        (0, 8, {"cuda": True}, 0, 8),
        (-1, 8, {"in_memory": True}, 0, 8),
        (-1, 8, {"batch": None}, 0, 8),
        (-1, 8, {"batch": Batch(0.001, MIB, 10**6)}, 0, 8),  # less than handing it over
        (-1, 8, {"batch": Batch(0.004, MIB, 20)}, 0, 8),  # an epoch of 80 ms
        (-1, 8, {"batch": Batch(0.004, MIB, 30)}, 4, 4),
        (-1, 8, {}, 4, 4),  # a model on the CPU takes half
        (-1, 8, {"cuda": True}, 7, 1),  # the rank's own thread takes one
        (-1, 1, {}, 0, 1),
        (-1, 1, {"cuda": True}, 0, 1),
        (-1, 8, {"iterable": True, "batch": None}, 1, 7),
        (-1, 1, {"iterable": True, "batch": None}, 0, 1),
        (3, 8, {"iterable": True, "batch": None}, 3, 5),
    ],
)
def test_workers_and_threads(
    wanted: int, per_rank: int, more: dict[str, Any], workers: int, threads: int
) -> None:
    found = size(wanted, per_rank, **more)
    assert (found.workers, found.threads) == (workers, threads)


@pytest.mark.parametrize("per_rank", range(1, 20))
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("more", [{}, {"iterable": True, "batch": None}, {"in_memory": True}])
def test_what_is_chosen_fits_in_the_budget(per_rank: int, cuda: bool, more: dict[str, Any]) -> None:
    found = size(per_rank=per_rank, cuda=cuda, **more)
    assert found.workers >= 0 and found.threads >= 1
    assert found.workers + found.threads <= per_rank


@pytest.mark.parametrize(
    ("budget", "workers", "told"),
    [
        # Half of 4 GiB by 2 ranks is 1 GiB; a worker takes 400 + 3 * 8 = 424 MiB.
        (memory(4 * GIB), 2, ["cgroup memory limit 4.0 GiB free", "424 MiB a worker"]),
        (memory(GIB), 0, ["cgroup memory limit 1.0 GiB free"]),
        # Half of 128 MiB by 2 ranks is 32 MiB; a worker's batches take 2 * 8.
        (memory(shm=128 * MIB), 2, ["/dev/shm 0.12 GiB free", "16 MiB a worker"]),
        (memory(shm=0), 0, ["/dev/shm 0.00 GiB free"]),
        (memory(shm=None), 7, ["cgroup quota"]),
        # The tighter of the two is the reason.
        (memory(4 * GIB, 64 * MIB), 1, ["/dev/shm 0.06 GiB free"]),
        (memory(2 * GIB, 160 * MIB), 1, ["cgroup memory limit 2.0 GiB free"]),
    ],
)
def test_memory_caps_the_workers_and_is_named(
    budget: MemoryBudget, workers: int, told: list[str]
) -> None:
    batch = Batch(0.05, 8 * MIB, 1000)
    found = size(cuda=True, memory=budget, batch=batch, own_memory=400 * MIB)
    assert found.workers == workers
    for words in [*told, "2 local ranks"]:
        assert words in found.reason


@pytest.mark.parametrize(
    ("cuda", "pin", "budget", "pinned"),
    [
        (True, "auto", PLENTY, True),
        (True, "auto", memory(swaps=True), False),
        # 7 workers of 3 batches of 1 MiB are 21 MiB; a tenth of memory by 2 ranks is more or less.
        (True, "auto", memory(430 * MIB), True),
        (True, "auto", memory(410 * MIB), False),
        (True, "true", memory(MIB, swaps=True), True),
        (True, "True", memory(MIB, swaps=True), True),
        (True, "false", PLENTY, False),
        (True, "False", PLENTY, False),
        (False, "auto", PLENTY, False),
        (False, "true", PLENTY, False),  # nothing to pin for
    ],
)
def test_pinned_memory(cuda: bool, pin: str, budget: MemoryBudget, pinned: bool) -> None:
    assert size(7, cuda=cuda, pin=pin, memory=budget).pin_memory is pinned


@pytest.mark.parametrize(
    ("wanted", "per_rank", "ranks", "more", "reason"),
    [
        (
            *(-1, 4, 2, {}),
            "2 workers a rank: 8 usable CPUs (cgroup quota; host has 64), 2 local ranks",
        ),
        (-1, 2, 1, {}, "1 worker a rank: 2 usable CPUs (cgroup quota; host has 64), 1 local rank"),
        (3, 4, 2, {}, "3 workers a rank: DATALOADER.NUM_WORKERS"),
        (-1, 4, 2, {"in_memory": True}, "0 workers a rank: the data set is in memory"),
    ],
)
def test_the_reason_for_the_log(
    wanted: int, per_rank: int, ranks: int, more: dict[str, Any], reason: str
) -> None:
    assert size(wanted, per_rank, ranks, **more).reason == reason


@pytest.mark.parametrize(
    ("env", "parent", "by_user"),
    [
        ({}, b"OMP_NUM_THREADS=4\0", False),
        ({"OMP_NUM_THREADS": "4"}, None, True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"HOME=/\0", False),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"A=1\0OMP_NUM_THREADS=1\0", True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"X_OMP_NUM_THREADS=1\0", False),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None, True),  # cannot be read
    ],
)
def test_whose_threads(
    tmp_path: Path, env: dict[str, str], parent: bytes | None, by_user: bool
) -> None:
    path = tmp_path / "environ"
    if parent is not None:
        path.write_bytes(parent)
    assert threads_set_by_user(env, path) is by_user
