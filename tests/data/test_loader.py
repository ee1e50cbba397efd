"""Requests and loaders: the same global batches at any rank count, from any batch on."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, default_collate

from launcher.data import loader as loader_module
from launcher.data.datasets import TensorData
from launcher.data.loader import Fetcher, Request, eval_requests, make_loader, train_requests
from launcher.data.order import Indices, Sequential, Shuffle
from launcher.data.plan import Plan
from launcher.errors import RunError

law = settings(deadline=None, max_examples=80)


class Squares(Dataset):
    """A map-style data set without `batch`; sample 13 can be made to fail."""

    def __init__(self, length: int = 50, broken: bool = False) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if self.broken and index == 13:
            raise KeyError("no such image")
        return index, torch.tensor([index, index**2])


class Watched:
    """An order that remembers which positions it was asked for."""

    def __init__(self, order: Shuffle) -> None:
        self.order = order
        self.asked: list[tuple[int, int]] = []

    def __call__(self, epoch: int, positions: Indices) -> Indices:
        self.asked += [(epoch, position) for position in positions.tolist()]
        return self.order(epoch, positions)


def by_step(requests: Iterator[Request], plan: Plan, rank: int, first: int, last: int) -> Any:
    """A rank's requests as one list of (epoch, indices) for each step."""
    steps = []
    for step in range(first, last):
        sizes = [b - a for a, b in plan.micro_batches(step % plan.steps_per_epoch, rank)]
        own = [next(requests) for _ in sizes]
        assert [len(request.indices) for request in own] == sizes
        steps.append([(request.epoch, i) for request in own for i in request.indices])
    assert next(requests, None) is None
    return steps


def expected_batches(length: int, batch_size: int, seed: int, first: int, last: int) -> Any:
    """Global batches written down the plain way: shuffle an epoch, cut it."""
    steps = []
    per_epoch = -(-length // batch_size)
    for step in range(first, last):
        epoch, k = divmod(step, per_epoch)
        whole = Shuffle(length, seed)(epoch, np.arange(length)).tolist()
        steps.append([(epoch, i) for i in whole[k * batch_size : (k + 1) * batch_size]])
    return steps


@law
@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 8),
    micro=st.integers(0, 6),
    first=st.integers(0, 30),
    count=st.integers(0, 12),
    at_once=st.integers(1, 64),
)
def test_any_rank_count_from_any_batch_on_gives_the_same_global_batches(
    length: int,
    batch_size: int,
    world_size: int,
    micro: int,
    first: int,
    count: int,
    at_once: int,
) -> None:
    plan = Plan(length, batch_size, False, world_size, micro)
    order, last = Watched(Shuffle(length, 11)), first + count
    with mock.patch.object(loader_module, "POSITIONS_AT_ONCE", at_once):
        ranks = [
            by_step(train_requests(plan, order, rank, first, last), plan, rank, first, last)
            for rank in range(world_size)
        ]
    together = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == expected_batches(length, batch_size, 11, first, last)
    # Seeking: nothing before `first` is even computed.
    epoch, k = divmod(first, plan.steps_per_epoch)
    assert all(place >= (epoch, plan.batch(k)[0]) for place in order.asked)


def test_seeking_far_into_an_endless_run_is_immediate() -> None:
    plan = Plan(10**9, 256, world_size=8)
    first = 10**12
    request = next(train_requests(plan, Shuffle(10**9, 0), 3, first, 1 << 62))
    assert request.epoch == first // plan.steps_per_epoch
    assert len(request.indices) == 32


@law
@given(length=st.integers(1, 100), batch_size=st.integers(1, 30), world_size=st.integers(1, 8))
def test_evaluation_deals_whole_batches_and_every_sample_once(
    length: int, batch_size: int, world_size: int
) -> None:
    plan = Plan(length, batch_size, world_size=world_size)
    alone = [request.indices for request in eval_requests(Plan(length, batch_size), 0)]
    dealt: list[Any] = [None] * plan.steps_per_epoch
    for rank in range(world_size):
        for turn, request in enumerate(eval_requests(plan, rank)):
            dealt[rank + turn * world_size] = request.indices
    assert dealt == alone
    assert list(chain(*alone)) == list(range(length))


FAILING = """
import sys
from launcher.data.loader import Fetcher, Request, batches, make_loader
from tests.data.test_loader import Squares
import torch
requests = [Request(0, [12, 13])]
loader = make_loader(Fetcher(Squares(broken=True), None), lambda: requests, 1, 2, False)
stream = batches(loader, torch.device("cpu"))
try:
    next(stream)
except Exception as error:
    kept = error  # its traceback holds the stream, as that of any error on its way out does
    print(type(error).__name__, error)
"""


def test_a_failing_sample_is_named() -> None:
    with pytest.raises(RunError) as caught:
        Fetcher(Squares(broken=True), None)[Request(0, [12, 13])]
    assert str(caught.value) == "sample 13 of data set Squares failed: KeyError: 'no such image'"


def test_a_sample_failing_in_a_worker_is_named_and_the_process_leaves() -> None:
    """Workers ignore SIGTERM, which is what Python ends them with at exit: it must not wait."""
    with subprocess.Popen(
        [sys.executable, "-c", FAILING], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert out.startswith("RunError")
    assert "sample 13 of data set Squares failed: KeyError: 'no such image'" in out


def test_the_tasks_collate_wins_over_a_data_sets_own_batch() -> None:
    fetcher = Fetcher(TensorData(torch.arange(5)), lambda samples: ("mine", len(samples)))
    assert fetcher[Request(0, [1, 2])] == ("mine", 2)


@settings(deadline=None, max_examples=20)
@given(indices=st.lists(st.integers(0, 19), min_size=1, max_size=30))
def test_tensor_data_batch_equals_collated_samples(indices: list[int]) -> None:
    rows = torch.arange(20)
    data = TensorData(torch.randn(20, 3, 2), rows, rows % 2 == 0)
    batch, collated = data.batch(indices), default_collate([data[i] for i in indices])
    assert len(batch) == len(collated)
    for a, b in zip(batch, collated, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("tensors", [(), (torch.zeros(3), torch.zeros(4))], ids=["none", "uneven"])
def test_tensor_data_takes_tensors_of_equal_length(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="equal length"):
        TensorData(*tensors)


@pytest.mark.parametrize("dataset", [Squares(), TensorData(torch.arange(50))], ids=["map", "batch"])
def test_workers_change_nothing(dataset: Any) -> None:
    plan = Plan(50, 8, micro_batch_size=3)

    def load(workers: int) -> list[Any]:
        requests = partial(train_requests, plan, Shuffle(50, 1), 0, 5, 12)
        state = torch.get_rng_state()
        loaded = list(make_loader(Fetcher(dataset, None), requests, workers, 2, False))
        # A resumed run starts its loader at another moment: that must not move the generator.
        assert torch.equal(state, torch.get_rng_state())
        return loaded

    alone, together = load(0), load(2)
    assert len(alone) == len(together) > 7
    for a, b in zip(alone, together, strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def test_batches_come_in_the_order_of_the_requests() -> None:
    plan = Plan(50, 10)
    requests = partial(train_requests, plan, Sequential(50), 0, 0, 5)
    loader = make_loader(Fetcher(TensorData(torch.arange(50)), None), requests, 0, 2, False)
    assert torch.cat([batch[0] for batch in loader]).tolist() == list(range(50))
