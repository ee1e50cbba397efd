"""Loader workers, compute threads and pinned memory, from the budgets of CPU and memory."""

from typing import Any

import pytest
import torch

from launcher.data.sizing import LoaderSize, size_loader
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.memory import MemoryBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from tests.engine.helpers import config

GIB, MIB = 2**30, 2**20


def memory(available: int = 64 * GIB, shm: int | None = 32 * GIB, swaps: bool = False) -> Any:
    return MemoryBudget(available, shm, swaps, "cgroup memory limit")


PLENTY, NONE = memory(), memory(MIB, MIB, swaps=True)


def size(
    wanted: int = -1,
    per_rank: int = 8,
    ranks: int = 2,
    cuda: bool = False,
    pin: str = "auto",
    kind: str = "map-style",
    free: MemoryBudget = PLENTY,
    nbytes: int = 8 * MIB,
) -> LoaderSize:
    keys = config("DATALOADER.NUM_WORKERS", wanted, "DATALOADER.PIN_MEMORY", pin).DATALOADER
    cpu = CpuBudget(64, per_rank * ranks, per_rank, "cgroup quota; host has 64")
    topology = Topology(world_size=ranks, local_world_size=ranks)
    runtime = Runtime(topology, torch.device("cuda" if cuda else "cpu"), cpu)
    return size_loader(keys, runtime, kind, free, 400 * MIB, nbytes)


WANTED, LIMIT = "DATALOADER.NUM_WORKERS", "cgroup memory limit"


def granted(usable: int, among: str = "2 local ranks") -> str:
    return f"{usable} usable CPUs (cgroup quota; host has 64), {among}"


def short_of(what: str, gib: str, each: int) -> str:
    return f"{what} {gib} GiB free, {each} MiB a worker, 2 local ranks"


@pytest.mark.parametrize(
    ("options", "workers", "threads", "why"),
    [
        ({"wanted": 5, "per_rank": 2}, 5, 1, WANTED),  # a user's value wins, even over the budget
        ({"wanted": 5, "per_rank": 2, "kind": "tensors", "free": NONE}, 5, 1, WANTED),
        ({"wanted": 0, "cuda": True}, 0, 8, WANTED),
        ({"wanted": 3, "kind": "iterable"}, 3, 5, WANTED),
        ({"kind": "tensors"}, 0, 8, "the data set is in memory"),
        ({"kind": "iterable"}, 1, 7, "an iterable data set is read by one"),
        ({"kind": "iterable", "per_rank": 1}, 0, 1, "an iterable data set is read by one"),
        ({}, 4, 4, granted(16)),  # a model on the CPU takes half
        ({"cuda": True}, 7, 1, granted(16)),  # the rank's own thread takes one
        ({"per_rank": 1}, 0, 1, granted(2)),
        ({"per_rank": 1, "cuda": True}, 0, 1, granted(2)),
        ({"per_rank": 2, "ranks": 1}, 1, 1, granted(2, "1 local rank")),
        # Half of 4 GiB by 2 ranks is 1 GiB; a worker takes 400 + 3 * 8 = 424 MiB.
        ({"cuda": True, "free": memory(4 * GIB)}, 2, 1, short_of(LIMIT, "4.00", 424)),
        ({"cuda": True, "free": memory(GIB)}, 0, 1, short_of(LIMIT, "1.00", 424)),
        # Half of 128 MiB by 2 ranks is 32 MiB; a worker's batches take 2 * 8.
        ({"cuda": True, "free": memory(shm=128 * MIB)}, 2, 1, short_of("/dev/shm", "0.12", 16)),
        ({"cuda": True, "free": memory(shm=0)}, 0, 1, short_of("/dev/shm", "0.00", 16)),
        ({"cuda": True, "free": memory(shm=None)}, 7, 1, granted(16)),
        # The tighter of the two is the reason.
        ({"cuda": True, "free": memory(4 * GIB, 64 * MIB)}, 1, 1, short_of("/dev/shm", "0.06", 16)),
        ({"cuda": True, "free": memory(2 * GIB, 160 * MIB)}, 1, 1, short_of(LIMIT, "2.00", 424)),
    ],
)
def test_workers_and_threads_and_the_reason_for_the_log(
    options: dict[str, Any], workers: int, threads: int, why: str
) -> None:
    found = size(**options)
    assert (found.workers, found.threads) == (workers, threads)
    assert found.reason == f"{workers} worker{'' if workers == 1 else 's'} a rank: {why}"


@pytest.mark.parametrize("per_rank", range(1, 20))
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("kind", ["map-style", "iterable", "tensors"])
def test_what_is_chosen_fits_in_the_cpus_and_threads_follow_from_them_alone(
    per_rank: int, cuda: bool, kind: str
) -> None:
    """Sums depend on the threads, and what memory is free depends on the moment."""
    found = size(per_rank=per_rank, cuda=cuda, kind=kind)
    assert found.workers >= 0 and found.threads >= 1
    assert found.workers + found.threads <= per_rank
    poor = size(per_rank=per_rank, cuda=cuda, kind=kind, free=NONE, nbytes=GIB)
    assert (poor.workers, poor.threads) == (0, found.threads)


@pytest.mark.parametrize(
    ("cuda", "pin", "budget", "pinned"),
    [
        (True, "auto", PLENTY, True),
        (True, "auto", memory(swaps=True), False),
        (True, "true", NONE, True),
        (True, "True", NONE, True),
        (True, "false", PLENTY, False),
        (True, "False", PLENTY, False),
        (False, "auto", PLENTY, False),
        (False, "true", PLENTY, False),  # nothing to pin for
    ],
)
def test_pinned_memory(cuda: bool, pin: str, budget: MemoryBudget, pinned: bool) -> None:
    assert size(7, cuda=cuda, pin=pin, free=budget).pin_memory is pinned
