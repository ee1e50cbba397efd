"""Requests and loaders: the same global batches at any rank count, from any batch on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from launcher.data import plan as plan_module
from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.order import Indices, Shuffle, sequential
from launcher.data.plan import Plan, Request, eval_requests, train_requests

law = settings(deadline=None, max_examples=80)


class Squares(Dataset):
    """A map-style data set without a fast path."""

    def __init__(self, length: int = 50) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
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
        assert [len(request.samples) for request in own] == sizes
        steps.append([(request.epoch, i) for request in own for i in request.samples])
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
    with mock.patch.object(plan_module, "POSITIONS_AT_ONCE", at_once):
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
    assert len(request.samples) == 32


@law
@given(length=st.integers(1, 100), batch_size=st.integers(1, 30), world_size=st.integers(1, 8))
def test_evaluation_deals_whole_batches_and_every_sample_once(
    length: int, batch_size: int, world_size: int
) -> None:
    plan = Plan(length, batch_size, world_size=world_size)
    alone = [request.samples for request in eval_requests(Plan(length, batch_size), 0)]
    dealt: list[Any] = [None] * plan.steps_per_epoch
    for rank in range(world_size):
        for turn, request in enumerate(eval_requests(plan, rank)):
            dealt[rank + turn * world_size] = request.samples
    assert dealt == alone
    assert list(chain(*alone)) == list(range(length))


@pytest.mark.parametrize(
    "dataset", [Squares(), TensorDataset(torch.arange(50))], ids=["map", "tensors"]
)
def test_workers_change_nothing(dataset: Any) -> None:
    plan = Plan(50, 8, micro_batch_size=3)

    def loaded_by(workers: int) -> list[Any]:
        requests = train_requests(plan, Shuffle(50, 1), 0, 5, 12)
        state = torch.get_rng_state()
        loaded = list(load(Fetcher(dataset, None, 0), requests, workers, 2, False, 60.0))
        # A resumed run starts its loader at another moment: that must not move the generator.
        assert torch.equal(state, torch.get_rng_state())
        return loaded

    alone, together = loaded_by(0), loaded_by(2)
    assert len(alone) == len(together) > 7
    for a, b in zip(alone, together, strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def test_batches_come_in_the_order_of_the_requests() -> None:
    plan = Plan(50, 10)
    requests = train_requests(plan, sequential, 0, 0, 5)
    loaded = load(Fetcher(TensorDataset(torch.arange(50)), None, 0), requests, 0, 2, False, 60.0)
    assert torch.cat([batch[0] for batch in loaded]).tolist() == list(range(50))


class Hostile(Dataset):
    """Sample 13 raises, kills its process after some seconds, or never comes."""

    def __init__(self, how: str, after_s: float) -> None:
        self.how, self.after_s = how, after_s

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        if index == 13:
            if self.how == "raises":
                raise KeyError("no such image")
            if self.how == "is stuck":
                time.sleep(600)
            time.sleep(self.after_s)
            os.kill(os.getpid(), getattr(signal, self.how))
        return index


HOSTILE = """
import sys, time
from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from tests.data.test_loader import Hostile
requests = [Request(0, [i, i + 1]) for i in range(0, 50, 2)]
how, after_s, step_s = sys.argv[1], *map(float, sys.argv[2:])
stream = load(Fetcher(Hostile(how, after_s), None, 0), requests, 2, 2, False, 3.0)
try:
    for batch in stream:
        print(batch.tolist(), flush=True)
        time.sleep(step_s)
except Exception as error:
    kept = error  # its traceback holds the stream, as that of any error on its way out does
    print(type(error).__name__, error, flush=True)
stream = None  # as Data.close() does
"""


DIED = ["worker died", "of data set Hostile", "were due"]


@pytest.mark.parametrize(
    ("how", "after_s", "step_s", "told"),
    [
        ("raises", 0, 0, ["sample 13 of data set Hostile failed: KeyError: 'no such image'"]),
        ("SIGKILL", 1, 0, [*DIED, "samples 12, 13", "SIGKILL", "memory"]),
        ("SIGBUS", 1, 0, [*DIED, "samples 12, 13", "/dev/shm is full"]),
        pytest.param("SIGKILL", 0, 0.7, [*DIED, "SIGKILL", "memory"], id="SIGKILL in a step"),
        ("is stuck", 0, 0, ["longer than 3 s (DIST.TRAIN_TIMEOUT)", "samples 12, 13", "Hostile"]),
    ],
)
def test_a_worker_that_fails_is_explained_and_the_process_leaves(
    how: str, after_s: float, step_s: float, told: list[str]
) -> None:
    """Workers ignore SIGTERM, which is what Python ends them with at exit: it must not wait."""
    with subprocess.Popen(
        [sys.executable, "-c", HOSTILE, how, str(after_s), str(step_s)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=40)
            with pytest.raises(ProcessLookupError):  # no worker is left either
                os.killpg(process.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    *batches, last = out.splitlines()
    assert [json.loads(batch) for batch in batches] == [[i, i + 1] for i in range(0, 12, 2)][
        : len(batches)
    ]
    assert last.startswith("RunError ")
    for words in told:
        assert words in last


class Pids(Dataset):
    """A sample is the process it was made in."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return os.getpid()


def test_workers_live_over_epochs_and_leave_with_the_stream() -> None:
    requests = [Request(epoch, [i]) for epoch in range(3) for i in range(4)]
    stream = load(Fetcher(Pids(), None, 0), requests, 2, 2, False, 60.0)
    seen = [int(next(stream)) for _ in range(10)]
    assert len(set(seen)) == 2 and os.getpid() not in seen
    stream.close()
    for pid in set(seen):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_workers_ignore_stop_signals(name: str) -> None:
    requests = [Request(0, [i]) for i in range(30)]
    stream = load(Fetcher(Pids(), None, 0), requests, 2, 2, False, 60.0)
    seen = [int(next(stream)) for _ in range(4)]
    for pid in set(seen):
        os.kill(pid, getattr(signal, name))
    assert {int(batch) for batch in stream} == set(seen)


def test_the_next_epochs_first_batch_is_asked_for_before_this_one_ends() -> None:
    plan, asked = Plan(40, 10), []

    def watched() -> Iterator[Request]:
        for request in train_requests(plan, sequential, 0, 0, 8):
            asked.append(request.epoch)
            yield request

    stream = load(Fetcher(Squares(40), None, 0), watched(), 1, 2, False, 60.0)
    for _ in range(3):
        next(stream)
    assert asked[-1] == 1  # a batch of epoch 0 is still to come
    assert len(list(stream)) == 5
