"""Loaders: a DataLoader that is told (epoch, indices) and answers with collated batches.

One iterator serves a whole attempt. Epochs are part of the requests, so workers live on across
them, the next epoch's first batch is fetched before this one ends, and nobody calls `set_epoch`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from launcher.data.order import Indices
from launcher.data.plan import Plan
from launcher.data.transfer import to_device
from launcher.errors import RunError

Order = Callable[[int, Indices], Indices]
# Indices are computed for about this many positions at a time: numpy's cost a call is then shared.
POSITIONS_AT_ONCE = 4096


class Request(NamedTuple):
    """What a loader worker is asked for: samples of an epoch, as one batch."""

    epoch: int
    indices: list[int]


class Fetcher(Dataset):
    """The user's data set as a map from a Request to a collated batch; runs in the workers."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self.dataset = dataset
        self.collate = collate or default_collate
        # A data set that makes a batch by itself is asked for it, unless the task collates.
        self.whole = getattr(dataset, "batch", None) if collate is None else None

    def __getitem__(self, request: Request) -> Any:
        if self.whole is not None:
            return self.whole(request.indices)
        samples = []
        for index in request.indices:
            try:
                samples.append(self.dataset[index])
            except Exception as error:
                name = type(self.dataset).__name__
                raise RunError(
                    f"sample {index} of data set {name} failed: {type(error).__name__}: {error}"
                ) from error
        return self.collate(samples)


class _Requests(Sampler):
    def __init__(self, make: Callable[[], Iterable[Request]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Request]:
        return iter(self.make())


def train_requests(plan: Plan, order: Order, rank: int, first: int, last: int) -> Iterator[Request]:
    """A rank's micro-batches of global batches [first, last), counted over all epochs.

    Seeking is arithmetic: nothing before `first` is computed or loaded.
    """
    step = first
    while step < last:
        epoch, k = divmod(step, plan.steps_per_epoch)
        # As many steps as make one good numpy call, up to the end of the epoch.
        many = max(1, POSITIONS_AT_ONCE * plan.world_size // plan.batch_size)
        count = min(many, plan.steps_per_epoch - k, last - step)
        cuts = [cut for i in range(count) for cut in plan.micro_batches(k + i, rank)]
        if cuts:
            positions = np.concatenate([np.arange(start, stop) for start, stop in cuts])
            indices = order(epoch, positions).tolist()
            at = 0
            for start, stop in cuts:
                yield Request(epoch, indices[at : at + stop - start])
                at += stop - start
        step += count


def eval_requests(plan: Plan, rank: int) -> Iterator[Request]:
    """A rank's batches of an evaluation: whole batches dealt in turn, nothing padded or dropped.

    A batch holds the same samples at any number of ranks, so each sample's result is the same to
    the last bit.
    """
    for k in range(rank, plan.steps_per_epoch, plan.world_size):
        yield Request(0, list(range(*plan.batch(k))))


def make_loader(
    fetcher: Fetcher,
    requests: Callable[[], Iterable[Request]],
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> DataLoader:
    """A DataLoader over requests. Its workers leave when its iterator is dropped."""
    return DataLoader(
        fetcher,
        sampler=_Requests(requests),
        batch_size=None,  # a request is a whole batch already
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Its base seed must not be drawn from the global generator: a resumed run would draw it
        # at another moment than the uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )


def batches(loader: DataLoader, device: torch.device) -> Iterator[Any]:
    """The loader's batches on the device."""
    for batch in loader:
        yield to_device(batch, device)


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_id: int) -> None:
    # A stop request is for the rank, which ends its workers itself once it has saved.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
