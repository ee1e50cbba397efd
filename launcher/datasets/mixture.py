"""A data set mixed of several, in given proportions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from launcher.data.order import Shuffle
from launcher.errors import UsageError


class Mixture(Dataset):
    """`length` samples an epoch from several map-style data sets, in proportion to `weights`.

    `datasets` is a list or a dict by name, and `weights` likewise: one number of at least 0 each.
    Every epoch has exactly `counts[i]` samples of data set i: its share of `length`, rounded so
    that the counts add up (largest remainders). Over the epochs each data set is gone through in a
    shuffled order of its own, every sample once before any comes again: that is one pass, and it
    may begin and end within an epoch. Which sample stands at an index is a pure function of (seed,
    epoch, index), at any number of loader workers and after any resume; the launcher tells the
    epoch by `set_epoch`. Read in order, every stretch holds about its share of each data set.

    A data set that has `set_epoch` is told the number of its pass before a sample of it is taken
    that is of another pass than the one before; it should be cheap, and draw no global random
    numbers. `deterministic` where all of them are: batches are then asked for whole.

    Raises UsageError for a data set that is empty, has no length or is iterable, for weights that
    do not match, and for a weight above 0 that is too small for one sample an epoch.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float],
        length: int,
        seed: int = 0,
    ) -> None:
        if isinstance(datasets, Mapping) != isinstance(weights, Mapping):
            raise UsageError("Mixture: datasets and weights are both lists, or both dicts by name")
        if isinstance(datasets, Mapping) and isinstance(weights, Mapping):
            if datasets.keys() != weights.keys():
                raise UsageError(
                    f"Mixture: the weights are of {', '.join(map(str, weights))}; the data sets "
                    f"are {', '.join(map(str, datasets))}"
                )
            weights = [weights[name] for name in datasets]
            self.names, self.datasets = [*map(str, datasets)], [*datasets.values()]
        else:
            self.names, self.datasets = [f"{i}" for i in range(len(datasets))], [*datasets]  # type: ignore[misc]
        if length < 1:
            raise UsageError(f"Mixture: length must be at least 1, not {length}")
        lengths = [_length(*named) for named in zip(self.names, self.datasets, strict=True)]
        self.counts = _counts(self.names, [*weights], length)
        self.length, self.epoch, self.ends = length, 0, [*accumulate(self.counts)]
        self.shuffles = [Shuffle(n, seed, use=i) for i, n in enumerate(lengths)]
        self.deterministic = all(getattr(d, "deterministic", False) for d in self.datasets)
        # Indices go round in steps of about the golden ratio of the length, which spreads each data
        # set's evenly; a step that has no divisor in common with the length meets every place once.
        step = round(length * (math.sqrt(5) - 1) / 2)
        self.step = next(s for s in range(max(1, step), 2 * length + 2) if math.gcd(s, length) == 1)
        # The pass that each was told, under the first place where it stands: it may stand twice.
        self.first = [next(i for i, d in enumerate(self.datasets) if d is e) for e in self.datasets]
        self.told: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def _place(self, index: int) -> tuple[int, int, int]:
        """Of the sample at `index` of this epoch: which data set, which pass, and the position in
        the order of that pass."""
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        slot = index * self.step % self.length
        source = bisect_right(self.ends, slot)
        inside = slot - self.ends[source] + self.counts[source]
        drawn = self.epoch * self.counts[source] + inside
        return source, *divmod(drawn, self.shuffles[source].length)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples at `indices`; those of one pass of a data set are taken together."""
        together: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for at, (source, turn, position) in enumerate(map(self._place, indices)):
            together.setdefault((source, turn), []).append((at, position))
        samples: list[Any] = [None] * len(indices)
        for (source, turn), places in together.items():
            ats, positions = zip(*places, strict=True)
            inside = self.shuffles[source](turn, np.array(positions)).tolist()
            for at, sample in zip(ats, taken_of(self._told(source, turn), inside), strict=True):
                samples[at] = sample
        return samples

    def _told(self, source: int, turn: int) -> Any:
        dataset, first = self.datasets[source], self.first[source]
        if self.told.get(first) != turn and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(turn)
            self.told[first] = turn
        return dataset


def taken_of(dataset: Any, indices: list[int]) -> list[Any]:
    """The samples at `indices`, in one call where the data set has `__getitems__`."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


def _length(name: str, dataset: Any) -> int:
    try:
        length = 0 if isinstance(dataset, IterableDataset) else len(dataset)
    except TypeError:
        raise UsageError(f"Mixture: data set {name} has no length; give it a __len__") from None
    if isinstance(dataset, IterableDataset):
        raise UsageError(f"Mixture: data set {name} is iterable; it takes map-style ones")
    if length < 1:
        raise UsageError(f"Mixture: data set {name} is empty")
    return length


def _counts(names: list[str], weights: list[float], length: int) -> list[int]:
    """Samples an epoch of each: whole numbers, in proportion, `length` together."""
    if len(weights) != len(names):
        raise UsageError(f"Mixture: {len(weights)} weights for {len(names)} data sets")
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise UsageError(f"Mixture: the weight of {name} is {weight}; a finite number from 0")
    if not any(weights):
        raise UsageError("Mixture: no weight is above 0")
    # Exact, so that shares of a half are told from those just below.
    total = sum(Fraction(float(weight)) for weight in weights)
    shares = [Fraction(float(weight)) / total * length for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: length - sum(counts)]:
        counts[i] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight and not count:
            raise UsageError(
                f"Mixture: the weight of {name}, {weight}, gives it no sample in an epoch of "
                f"{length}; give a larger length, or leave it out"
            )
    return counts
