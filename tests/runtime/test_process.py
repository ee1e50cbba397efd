"""Seeds, the device of a rank, and the collectives of one process."""

import random

import numpy as np
import pytest
import torch

from launcher.errors import UsageError
from launcher.runtime.process import choose_device, seed_everything
from launcher.runtime.topology import Topology
from tests.engine.helpers import ALONE


def draws(seed: int, rank: int) -> tuple[float, float, float]:
    seed_everything(seed, rank)
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_seeding_twice_gives_the_same_draws(seed: int) -> None:
    assert draws(seed, 3) == draws(seed, 3)


def test_each_generator_depends_on_seed_and_rank() -> None:
    """No two (seed, rank) share a stream, not even (0, 1) and (1, 0) as seed + rank would."""
    pairs = [(seed, rank) for seed in range(4) for rank in range(4)]
    for generator in zip(*(draws(*pair) for pair in pairs), strict=True):
        assert len(set(generator)) == len(pairs)


@pytest.mark.parametrize(
    ("choice", "ranks", "gpus", "told"),
    [
        ("auto", 4, 2, "^4 ranks .*CUDA devices: 2.*--nproc-per-node=2,.*DIST.DEVICE cpu"),
        ("cuda", 2, 1, "^2 ranks .*CUDA devices: 1.*--nproc-per-node=1,"),
        ("cuda", 1, 0, "CUDA devices: 0.*DIST.DEVICE cpu"),
    ],
)
def test_more_ranks_than_devices(
    monkeypatch: pytest.MonkeyPatch, choice: str, ranks: int, gpus: int, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=told) as caught:
        choose_device(Topology(world_size=ranks, local_world_size=ranks), choice)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "gpus", "device", "bound"),
    [
        ("cpu", 2, "cpu", []),
        ("cpu", 0, "cpu", []),
        ("auto", 0, "cpu", []),
        ("auto", 4, "cuda:3", [3]),
        ("cuda", 4, "cuda:3", [3]),
    ],
)
def test_the_cpu_or_one_gpu_a_local_rank_bound_at_once(
    monkeypatch: pytest.MonkeyPatch, choice: str, gpus: int, device: str, bound: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    topology = Topology(rank=7, local_rank=3, world_size=8, local_world_size=4)
    assert choose_device(topology, choice) == torch.device(device)
    assert found == bound


def test_collectives_of_one_process_give_back_what_they_get() -> None:
    assert ALONE.gather("x") == ["x"]
    assert ALONE.broadcast("x") == "x"
