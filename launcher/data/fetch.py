"""From a request to a collated batch. This is what runs in the loader workers.

What a sample draws follows from (SEED, epoch, sample): not from workers, ranks or restarts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, IterDataPipe, TensorDataset

from launcher.data.order import keys, mix
from launcher.data.plan import Request
from launcher.edges.batch import stacked
from launcher.edges.generators import Seed, Seeding, generators_kept, seed_generators
from launcher.edges.sending import told
from launcher.errors import RunError, UsageError
from launcher.log import get_logger

logger = get_logger(__name__)
Collate = Callable[[list[Any]], Any]
READ_AGAIN = (
    "the training data set has neither state_dict and load_state_dict nor an iterator with skip: "
    "it is read again from the epoch's start up to where the run was, which is exact only if it "
    "yields the same samples each time"
)


def collate_of(dataset: Any, other: Collate | None) -> Collate | None:
    """The data set's own `collate`, or else the `other`. A torch data pipe's makes another pipe."""
    own = None if isinstance(dataset, IterDataPipe) else getattr(dataset, "collate", None)
    return own or other


def kind_of(dataset: Any, collate: Collate | None) -> str:
    """How a data set is read: "iterable" from its start, "tensors" by one index operation a tensor
    and batch, any other ("map-style") sample by sample."""
    if isinstance(dataset, IterableDataset):
        return "iterable"
    return "tensors" if type(dataset) is TensorDataset and collate is None else "map-style"


def sample_seeds(seed: int, epoch: int, samples: list[int]) -> list[int]:
    """One 64-bit seed a sample."""
    return mix(np.asarray(samples, np.uint64) + keys(seed, epoch, 1, use=1)).tolist()


def tell_epoch(dataset: Any, seed: int | None, epoch: int) -> None:
    """Call `set_epoch(epoch)`, where the data set has it, seeded as samples are."""
    if not hasattr(dataset, "set_epoch"):
        return
    if seed is None:
        dataset.set_epoch(epoch)
        return
    with generators_kept():
        seed_generators(int(keys(seed, epoch, 1, use=2)[0]))
        dataset.set_epoch(epoch)


class Fetcher(Dataset):
    """A map-style data set as a map from a Request to a collated batch.

    A data set may have `__getitems__(indices) -> samples`; it is used where the data set draws no
    random numbers, which is found out, or said with an attribute `deterministic`, or where samples
    are not seeded. `set_epoch(epoch)` is called, where it exists, before another epoch's first one.
    """

    def __init__(
        self, dataset: Any, collate: Collate | None, seed: int | None, skip_bad: bool = False
    ) -> None:
        self.dataset, self.collate, self.skip_bad = dataset, collate or stacked, skip_bad
        self.tensors = kind_of(dataset, collate) == "tensors"
        self.seed = None if getattr(dataset, "deterministic", False) else seed
        self.whole, self.seeding = getattr(dataset, "__getitems__", None), Seeding()
        self.skipped, self.epoch = 0, -1

    def __getitem__(self, request: Request) -> Any:
        if self.tensors:
            # Half the time of dataset[samples].
            chosen = torch.from_numpy(np.array(request.samples))
            return [t.index_select(0, chosen.to(t.device)) for t in self.dataset.tensors]
        if self.epoch != request.epoch:
            tell_epoch(self.dataset, self.seed, request.epoch)
            self.epoch = request.epoch
        skipped = self.skipped

        def make(seed: Seed | None, mask: int) -> Any:
            self.skipped = skipped
            return self.collate(self._samples(*request, seed, mask))

        return make(None, 0) if self.seed is None else self.seeding(make)

    def _samples(self, epoch: int, indices: list[int], seed: Seed | None, mask: int) -> list[Any]:
        if seed is None and self.whole is not None:
            try:
                return self.whole(indices)
            except Exception as error:
                if not self.skip_bad:
                    raise _failed(self.dataset, f"samples {indices}", error) from error
        samples: list[Any] = []
        seeds = [n & mask for n in sample_seeds(self.seed or 0, epoch, indices)] if seed else []
        try:  # no call of ours a sample
            if seed is None:
                for index in indices:
                    samples.append(self.dataset[index])
            else:
                for index, number in zip(indices, seeds, strict=True):
                    seed(number)
                    samples.append(self.dataset[index])
        except Exception as error:
            samples.append(self._instead(indices[len(samples)], error))
            for i in range(len(samples), len(indices)):
                if seed is not None:
                    seed(seeds[i])
                samples.append(self._sample(indices[i]))
        if seed is not None:
            seed(seeds[0] ^ 1)  # a collate that mixes samples draws its own
        return samples

    def _sample(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return self._instead(index, error)

    def _instead(self, index: int, error: Exception) -> Any:
        if isinstance(error, UsageError) and not isinstance(error, RunError):
            raise error  # no bad sample, but a mistake that every sample would tell of
        failure = _failed(self.dataset, f"sample {index}", error)
        if not self.skip_bad:
            raise failure from error
        # The next sample that can be read takes its place, so that batches keep their size.
        length = len(self.dataset)
        for other in (i % length for i in range(index + 1, index + length)):
            with contextlib.suppress(Exception):
                sample = self.dataset[other]
                self.skipped += 1
                told = "%s; took sample %d in its place (%d so far in this process)"
                logger.warning(told, failure, other, self.skipped)
                return sample
        raise failure


class Stated(NamedTuple):
    """A batch, and the stream's state after `position` samples of `epoch`."""

    batch: Any
    state: dict[str, Any]


class StreamFetcher(Dataset):
    """An iterable data set as a map from Requests, in rising order, to collated batches.

    Every reader (each worker of each rank) walks the same stream and keeps the positions it is
    asked for, so the order depends on neither. What it passes over costs what producing it costs,
    unless the data set's iterator has `skip(count)`, which returns how many it passed over, fewer
    than `count` at its end. `set_epoch(epoch)` is called at each start, where it exists. With
    `state_dict` and `load_state_dict` the data set resumes where it was, without them it is read
    again from the epoch's start.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate | None,
        seed: int | None,
        endless: bool = False,
        state_every: int = 0,
        saved: dict[str, Any] | None = None,
        begin: int = 0,
    ) -> None:
        """An `endless` one starts again where it ends, within the epoch. A batch that begins at a
        multiple of `state_every` comes as a Stated, where the data set has a state (0: none does);
        `saved` is such a state to go on from; `begin` where in its epoch the attempt begins."""
        self.dataset, self.collate, self.seed = dataset, collate or stacked, seed
        self.endless, self.saved, self.begin = endless, saved or {}, begin
        self.state_every = state_every if hasattr(dataset, "state_dict") else 0
        self.epoch, self.passes, self.position = -1, 0, 0
        self.iterator: Iterator[Any] = iter(())

    def __getitem__(self, request: Request) -> Any:
        start = request.samples[0]
        with contextlib.nullcontext() if self.seed is None else generators_kept():
            if self.epoch != request.epoch:
                here = self.saved.get("epoch") == request.epoch
                self._begin(**(self.saved if here else {"epoch": request.epoch}))
                if not (here or hasattr(self.iterator, "skip")) and start == self.begin > 0:
                    logger.warning(READ_AGAIN)  # by one reader: who begins the attempt
                self.begin = 0
            self._skip(start - self.position)
            batch = self.collate([self._next() for _ in request.samples])
        if not self.state_every or start % self.state_every:
            return batch
        state = {"epoch": self.epoch, "passes": self.passes, "position": self.position}
        return Stated(batch, {**state, "dataset": copy.deepcopy(self.dataset.state_dict())})

    def _begin(self, epoch: int, passes: int = 0, position: int = 0, dataset: Any = None) -> None:
        """Start an epoch, or a pass of an endless one; `dataset` is its state, if it has one."""
        self.epoch, self.passes, self.position = epoch, passes, position
        tell_epoch(self.dataset, self.seed, epoch + passes)
        if dataset is not None:
            self.dataset.load_state_dict(dataset)
        self.iterator = iter(self.dataset)

    def _skip(self, count: int) -> None:
        if count > 0 and hasattr(self.iterator, "skip"):
            passed = self.iterator.skip(count)
            self.position += passed
            count -= passed
        # Where the stream cannot skip, or ended on the way.
        for _ in range(count):
            self._next()

    def _next(self) -> Any:
        if self.seed is not None:
            seed_generators(*sample_seeds(self.seed, self.epoch, [self.position]))
        name = type(self.dataset).__name__
        for _ in range(2):
            try:
                sample = next(self.iterator)
            except StopIteration:
                if not self.endless:
                    raise RunError(
                        f"data set {name} ended after {self.position} samples of epoch "
                        f"{self.epoch}; its len() says there are more"
                    ) from None
                self._begin(self.epoch, self.passes + 1, self.position)
            except Exception as error:
                raise _failed(self.dataset, f"sample {self.position}", error) from error
            else:
                self.position += 1
                return sample
        raise RunError(f"data set {name} yields no samples")


def _failed(dataset: Any, what: str, error: Exception) -> RunError:
    return told(f"{what} of data set {type(dataset).__name__} failed", error)
