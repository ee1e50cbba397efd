"""From a request to a collated batch. This is what runs in the loader workers."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate, get_worker_info

from launcher.data.order import keys, mix
from launcher.errors import RunError, UsageError

logger = logging.getLogger(__name__)
Collate = Callable[[list[Any]], Any]


class Request(NamedTuple):
    """Samples of an epoch, by index, as one batch."""

    epoch: int
    indices: list[int]


class Seeds:
    """Seeds for torch, numpy and random from (SEED, epoch, sample), so that what a sample draws
    does not depend on workers, ranks or restarts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of(self, epoch: int, samples: list[int]) -> list[int]:
        """One 64-bit seed a sample."""
        key = keys(self.seed, epoch, 1, use=1)
        return mix(np.asarray(samples, np.uint64) + key).tolist()

    @staticmethod
    def set(seed: int) -> None:
        """Seed the CPU generators: 7 microseconds. `torch.manual_seed` takes 84, for it asks every
        device as well."""
        torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)

    @staticmethod
    @contextmanager
    def kept() -> Iterator[None]:
        """Put the process's own random states back at the end. Once a batch: 80 microseconds; a
        worker has no random state that anybody else uses."""
        if get_worker_info() is not None:
            yield
            return
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])


def is_tensors(dataset: Any, collate: Collate | None) -> bool:
    """Whether a data set is made of tensors, so that a batch is one index operation a tensor."""
    return type(dataset) is TensorDataset and collate is None


class Fetcher(Dataset):
    """A map-style data set as a map from a Request to a collated batch.

    A data set may have `__getitems__(indices) -> samples`; it is used when samples are not seeded,
    or when the data set says that it draws no random numbers with an attribute `deterministic`.
    """

    def __init__(
        self, dataset: Any, collate: Collate | None, seed: int | None, skip_bad: bool = False
    ) -> None:
        self.dataset, self.collate, self.skip_bad = dataset, collate or default_collate, skip_bad
        self.tensors = is_tensors(dataset, collate)
        seeded = seed is not None and not getattr(dataset, "deterministic", False)
        self.seeds = Seeds(seed) if seeded and seed is not None else None
        self.whole = None if seeded else getattr(dataset, "__getitems__", None)
        self.skipped = 0

    def __getitem__(self, request: Request) -> Any:
        if self.tensors:
            return list(self.dataset[torch.as_tensor(request.indices)])
        if self.seeds is None:
            return self.collate(self._unseeded(request.indices))
        with self.seeds.kept():
            seeds = self.seeds.of(request.epoch, request.indices)
            samples = []
            for index, seed in zip(request.indices, seeds, strict=True):
                self.seeds.set(seed)
                samples.append(self._sample(index))
            self.seeds.set(seeds[0] ^ 1)  # a collate that mixes samples draws its own
            return self.collate(samples)

    def _unseeded(self, indices: list[int]) -> list[Any]:
        if self.whole is not None:
            try:
                return self.whole(indices)
            except Exception as error:
                if not self.skip_bad:
                    raise self._failure(f"samples {indices}", error) from error
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            if isinstance(error, UsageError) and not isinstance(error, RunError):
                raise  # no bad sample, but a mistake that every sample would tell of
            failure = self._failure(f"sample {index}", error)
            if not self.skip_bad:
                raise failure from error
        # The next sample that can be read takes its place, so that batches keep their size.
        length = len(self.dataset)
        for other in itertools.islice(itertools.cycle(range(length)), index + 1, index + length):
            try:
                sample = self.dataset[other]
            except Exception:
                continue
            self.skipped += 1
            logger.warning(
                "%s; took sample %d in its place (%d so far in this process)",
                failure,
                other,
                self.skipped,
            )
            return sample
        raise failure

    def _failure(self, what: str, error: Exception) -> RunError:
        name = type(self.dataset).__name__
        return RunError(f"{what} of data set {name} failed: {type(error).__name__}: {error}")
