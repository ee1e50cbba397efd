"""Some samples of a data set, as one of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from launcher.data.order import Shuffle


class Part(Dataset):
    """The samples of these indices of a map-style data set, in this order, with its `collate` and
    `set_epoch`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices
        for name in ("collate", "set_epoch"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __copy__(self) -> Part:
        return Part(copy.copy(self.dataset), self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def shuffled_part(dataset: Any, most: int, seed: int) -> Part:
    """At most so many samples: the first ones of a shuffled epoch; of an iterable data set its own
    first ones, kept in memory."""
    if isinstance(dataset, IterableDataset):
        kept = list(itertools.islice(iter(dataset), most))
        return Part(kept, range(len(kept)))
    length = len(dataset)
    indices = Shuffle(length, seed)(0, np.arange(min(length, most)))
    return Part(dataset, indices.tolist())
