"""The global order of samples: a pure function of (seed, epoch, position).

No list of indices is ever made. A position is turned into a sample index by itself, so seeking is
free, memory is constant, and an epoch over 10^9 samples starts at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.errors import RunError, UsageError

Indices = npt.NDArray[np.int64]
# (epoch, positions in the global order, shape (n,)) -> sample indices, shape (n,)
Order = Callable[[int, Indices], Indices]
_U64 = npt.NDArray[np.uint64]

# Rounds of the shuffle. tests/data/test_order.py measures its quality at this number.
ROUNDS = 10


def mix(x: _U64) -> _U64:
    """Scramble 64-bit words (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache  # the same for all batches of an epoch; to be read alone
def keys(seed: int, epoch: int, count: int, use: int = 0) -> _U64:
    """`count` independent 64-bit keys for an epoch, others for every `use`."""
    words = np.random.SeedSequence([seed, epoch, use]).generate_state(count, np.uint64)
    return words.astype(np.uint64, copy=False)


class Shuffle:
    """A keyed pseudo-random permutation of range(length).

    A Feistel network over Z_a x Z_b with a * b just above `length`: each round adds a keyed hash of
    one half to the other half, which can be undone, so the whole is one-to-one. The few values that
    land outside `length` go through again until they are inside (cycle walking). Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """

    def __init__(self, length: int, seed: int, use: int = 0) -> None:
        self.length, self.seed, self.use = length, seed, use
        # The smallest a with a * a >= length, by whole numbers: sqrt is wrong near 2^53.
        a = max(1, int(np.sqrt(length)))
        while a * a < length:
            a += 1
        self.a = np.uint64(a)
        self.b = np.uint64(max(1, -(-length // a)))

    def __call__(self, epoch: int, positions: Indices) -> Indices:
        round_keys = keys(self.seed, epoch, 2 * ROUNDS, self.use)
        out = self._permute(positions.astype(np.uint64), round_keys)
        while (outside := np.flatnonzero(out >= self.length)).size:
            out[outside] = self._permute(out[outside], round_keys)
        return out.astype(np.int64)

    def _permute(self, x: _U64, round_keys: _U64) -> _U64:
        high, low = np.divmod(x, self.b)
        for i in range(0, 2 * ROUNDS, 2):
            # The hash is reduced before it is added: a sum that wraps at 2^64 cannot be undone.
            high = (high + mix(low + round_keys[i]) % self.a) % self.a
            low = (low + mix(high + round_keys[i + 1]) % self.b) % self.b
        return high * self.b + low


def sequential(epoch: int, positions: Indices) -> Indices:
    """The data set's own order, the same in every epoch."""
    return positions


def replacement(length: int, seed: int, epoch: int, positions: Indices) -> Indices:
    """Independent uniform draws: a sample may stand several times in an epoch, or not at all."""
    return (uniform(seed, epoch, positions) * length).astype(np.int64)


class Weighted:
    """Independent draws in proportion to a weight a sample.

    Keeps the running sum of the weights: 8 bytes a sample.
    """

    def __init__(self, weights: Any, length: int, seed: int) -> None:
        values = np.asarray(weights, dtype=np.float64)
        fine = values.shape == (length,) and np.isfinite(values).all() and (values >= 0).all()
        if not fine or not values.any():
            raise UsageError(
                "TRAIN.SAMPLER weighted needs a data set with an attribute `weights`: one finite "
                f"number of at least 0 for each of its {length} samples, and not all zero"
            )
        self.ends, self.seed = np.cumsum(values), seed

    def __call__(self, epoch: int, positions: Indices) -> Indices:
        drawn = uniform(self.seed, epoch, positions) * self.ends[-1]
        # Right: a draw on the end of one sample's interval is the next sample's, and a weight of
        # zero has no interval. Rounding may put a draw on the very end: the last one with weight.
        last = np.searchsorted(self.ends, self.ends[-1], side="left")
        return np.minimum(np.searchsorted(self.ends, drawn, side="right"), last)


def uniform(seed: int, epoch: int, positions: Indices) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one a position, each on its own."""
    first, second = keys(seed, epoch, 2)
    words = mix(mix(positions.astype(np.uint64) + first) ^ second)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def own(dataset: Any, length: int, epoch: int, positions: Indices) -> Indices:
    """What the data set's `order` returns; RunError where that is not one index a position."""
    made = np.asarray(dataset.order(epoch, positions))
    wrong = made[(made < 0) | (made >= length)] if made.dtype.kind in "iu" else made
    if made.shape == positions.shape and not wrong.size:
        return made.astype(np.int64)
    raise RunError(
        f"{type(dataset).__name__}.order({epoch}, positions) returned {made.dtype} of shape "
        f"{made.shape}, {wrong.ravel()[:3].tolist()} in it; expected are integers of shape "
        f"{positions.shape}, at least 0 and below {length}"
    )


def make_order(sampler: str, dataset: Any, length: int, seed: int, batch_size: int) -> Order:
    """The order that TRAIN.SAMPLER names; some need what the data set has for them."""
    if sampler == "sequential":
        return sequential
    if sampler == "replacement":
        return functools.partial(replacement, length, seed)
    if sampler == "weighted":
        return Weighted(getattr(dataset, "weights", None), length, seed)
    if sampler == "grouped":
        from launcher.data.grouped import grouped  # which is made of what stands here

        return grouped(dataset, length, batch_size, seed)
    if sampler == "dataset":
        if not callable(getattr(dataset, "order", None)):
            raise UsageError("TRAIN.SAMPLER dataset: the data set has no order(epoch, positions)")
        return functools.partial(own, dataset, length)
    return Shuffle(length, seed)
