"""Which samples a rank takes, step by step and micro-batch by micro-batch.

Pure arithmetic on (length, batch size, ranks), so every rank knows what all the others do and no
collective is needed to agree. Seeking is free: nothing before it is computed or loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from launcher.data.order import Order
from launcher.errors import UsageError

# Indices are computed for about this many positions at a time: numpy's cost a call is then shared.
POSITIONS_AT_ONCE = 4096
# The length of a stream that does not tell its own: one endless epoch.
ENDLESS = 1 << 62


def share(count: int, parts: int, part: int) -> tuple[int, int]:
    """[start, stop) of one part of `count` things; parts differ by at most one, larger first."""
    base, extra = divmod(count, parts)
    start = part * base + min(part, extra)
    return start, start + base + (part < extra)


@dataclass(frozen=True)
class Plan:
    """An epoch of `length` samples as global batches of `batch_size` over `world_size` ranks."""

    length: int
    batch_size: int
    drop_last: bool = False
    world_size: int = 1
    micro_batch_size: int = 0
    shards: int = 0  # that a global batch is cut into before ranks take them; 0: one a rank

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"The data set has {self.length} samples, fewer than one batch of "
                f"{self.batch_size}, which TRAIN.DROP_LAST leaves out: nothing is left. Set "
                "TRAIN.DROP_LAST False or a smaller TRAIN.BATCH_SIZE."
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        if self.drop_last:
            return self.length // self.batch_size
        return -(-self.length // self.batch_size)

    @property
    def uneven(self) -> bool:
        """Whether some global batch gives ranks different numbers of micro-batches."""
        return any(self.full_rounds(k) < self.rounds(k) for k in {0, self.steps_per_epoch - 1})

    @property
    def gives_one_sample(self) -> bool:
        """Whether some micro-batch has one sample."""
        batches = {0, self.steps_per_epoch - 1}
        cuts = (self.micro_batches(k, rank) for k in batches for rank in range(self.world_size))
        return any(stop - start == 1 for parts in cuts for start, stop in parts)

    @cached_property
    def samples_per_epoch(self) -> int:
        return min(self.length, self.steps_per_epoch * self.batch_size)

    def batches_in(self, samples: int) -> int:
        """Global batches, over all epochs, that `samples` consumed samples make."""
        epochs, inside = divmod(samples, self.samples_per_epoch)
        return epochs * self.steps_per_epoch + -(-inside // self.batch_size)

    def batch(self, k: int) -> tuple[int, int]:
        """[start, stop) positions of global batch `k` of an epoch."""
        return k * self.batch_size, min((k + 1) * self.batch_size, self.samples_per_epoch)

    def micro_batches(self, k: int, rank: int) -> list[tuple[int, int]]:
        """[start, stop) positions of a rank's micro-batches of global batch `k`; may be empty.

        A share is cut into equal parts, so that no micro-batch is a small leftover.
        """
        start, stop = self.batch(k)
        shards = self.shards or self.world_size
        mine = share(shards, self.world_size, rank)
        cuts = [cut for shard in range(*mine) for cut in self.cuts(stop - start, shard)]
        return [(start + a, start + b) for a, b in cuts]

    def cuts(self, count: int, shard: int) -> list[tuple[int, int]]:
        """[start, stop) of a shard's micro-batches in a global batch of `count` samples."""
        first, last = share(count, self.shards or self.world_size, shard)
        size = last - first
        parts = -(-size // self.micro_batch_size) if self.micro_batch_size else min(size, 1)
        return [(first + a, first + b) for a, b in (share(size, parts, i) for i in range(parts))]

    def rounds(self, k: int) -> int:
        """The most micro-batches that any rank has of global batch `k`."""
        return len(self.micro_batches(k, 0))  # the largest share is the first

    def full_rounds(self, k: int) -> int:
        """The fewest; 0 where a rank has no sample."""
        return len(self.micro_batches(k, self.world_size - 1))


class Request(NamedTuple):
    """Samples of an epoch, as one batch: indices of a map-style data set, or positions in the
    stream of an iterable one, rising without a gap."""

    epoch: int
    samples: list[int]


def train_requests(plan: Plan, order: Order, rank: int, first: int, last: int) -> Iterator[Request]:
    """A rank's micro-batches of global batches [first, last), counted over all epochs."""
    while first < last:
        epoch, k = divmod(first, plan.steps_per_epoch)
        # As many global batches as make one good numpy call, up to the epoch's end, or to `last`.
        many = max(1, POSITIONS_AT_ONCE * plan.world_size // plan.batch_size)
        stop = min(k + many, plan.steps_per_epoch, k + last - first)
        cuts = [cut for i in range(k, stop) for cut in plan.micro_batches(i, rank)]
        if cuts:
            samples = iter(order(epoch, np.concatenate([np.arange(*cut) for cut in cuts])).tolist())
            for start, end in cuts:
                yield Request(epoch, [*itertools.islice(samples, end - start)])
        first += stop - k


def dealt(plan: Plan, rank: int, shares: int = 0) -> list[tuple[int, bool]]:
    """The numbers of a rank's batches of an evaluation, and whether each begins a share: whole
    batches, nothing padded or dropped, in so many contiguous shares (0: each batch is one), which
    are dealt in turn. Batches and shares are the same at any number of ranks, and so is each
    sample's result, to the last bit. No rank has more than rank 0.
    """
    steps = plan.steps_per_epoch
    cuts = (share(steps, shares or steps, i) for i in range(rank, shares or steps, plan.world_size))
    return [(k, k == start) for start, stop in cuts for k in range(start, stop)]
