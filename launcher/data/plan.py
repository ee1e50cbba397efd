"""Which positions of the global order a rank takes, step by step and micro-batch by micro-batch.

Pure arithmetic on (length, batch size, ranks), so every rank knows what all the others do and no
collective is needed to agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UsageError


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

    def __post_init__(self) -> None:
        if self.length == 0:
            raise UsageError("The data set is empty: build_dataset returned one of length 0.")
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"The data set has {self.length} samples, fewer than one batch of "
                f"{self.batch_size}, and TRAIN.DROP_LAST leaves out an epoch's last, smaller "
                "batch: nothing is left. Set TRAIN.DROP_LAST False or a smaller TRAIN.BATCH_SIZE."
            )

    @property
    def steps_per_epoch(self) -> int:
        if self.drop_last:
            return self.length // self.batch_size
        return -(-self.length // self.batch_size)

    @property
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

        The share is cut into equal parts, so that no micro-batch is a small leftover.
        """
        start, stop = self.batch(k)
        first, last = share(stop - start, self.world_size, rank)
        count = last - first
        parts = -(-count // self.micro_batch_size) if self.micro_batch_size else min(count, 1)
        cuts = [share(count, parts, part) for part in range(parts)]
        return [(start + first + a, start + first + b) for a, b in cuts]
