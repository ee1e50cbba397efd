"""The order whose global batches hold samples that are alike: of one group, or of similar length.

A pure function as those of order.py; it keeps 8 bytes a sample.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from launcher.data.order import Indices, Shuffle
from launcher.errors import UsageError

# Groups that lengths are cut into, of at least two global batches each.
BUCKETS = 50


class Grouped:
    """Every sample once an epoch: full batches of one group each, in shuffled order, and then what
    is left of the groups, fewer than a batch each, group after group. Members are shuffled too."""

    def __init__(self, groups: Indices, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.members = np.argsort(groups, kind="stable")
        self.counts = np.unique(groups, return_counts=True)[1]
        self.starts = np.cumsum(self.counts) - self.counts
        full = self.counts // batch_size * batch_size
        self.whole = int(full.sum())  # positions in full batches
        self.shuffle = Shuffle(self.whole // batch_size, seed, use=3)
        # Where each group's full batches end and, after all of these, each group's rest; and how
        # far they lie from their members.
        sizes = np.concatenate([full, self.counts - full])
        self.ends = np.cumsum(sizes)
        self.shift = np.concatenate([self.starts, self.starts + full]) - self.ends + sizes

    def __call__(self, epoch: int, positions: Indices) -> Indices:
        places, mine = positions.copy(), positions < self.whole
        batch, inside = np.divmod(positions[mine], self.batch_size)
        places[mine] = self.shuffle(epoch, batch) * self.batch_size + inside
        part = np.searchsorted(self.ends, places, side="right")
        places, group = places + self.shift[part], part % len(self.counts)
        for g in np.unique(group).tolist():
            mine, start = group == g, self.starts[g]
            shuffle = Shuffle(int(self.counts[g]), self.seed, use=4 + g)
            places[mine] = shuffle(epoch, places[mine] - start) + start
        return self.members[places]


def grouped(dataset: Any, length: int, batch_size: int, seed: int) -> Grouped:
    """By the data set's `groups`, or else by its `lengths`, in quantiles."""
    by_length = getattr(dataset, "groups", None) is None
    with contextlib.suppress(ValueError):  # of a list of unequal lists
        values = np.asarray(getattr(dataset, "lengths" if by_length else "groups", None))
        fits = values.shape == (length,) and values.dtype.kind in ("iuf" if by_length else "biu")
        if fits and np.isfinite(values).all():
            if by_length:
                batches = -(-length // batch_size)
                # Equal ones by chance, not by place: a data set may be sorted by class.
                chance = Shuffle(length, seed)(0, np.arange(length))
                rank = np.argsort(np.lexsort((chance, values)))
                values = rank // batch_size * min(BUCKETS, max(1, batches // 2)) // batches
            return Grouped(values, batch_size, seed)
    raise UsageError(
        "TRAIN.SAMPLER grouped needs a data set with an attribute `groups`, one integer for each "
        f"of its {length} samples, or `lengths`, one finite number for each"
    )
