"""The global order of samples: a permutation, evenly random, found at any position by itself."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import order
from launcher.data.order import Indices, Order, Shuffle, Weighted, make_order, sequential
from launcher.errors import RunError, UsageError

law = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 10**6)


ORDERS: dict[str, Callable[[int, int], Order]] = {
    "shuffle": Shuffle,
    "replacement": lambda length, seed: make_order("replacement", None, length, seed, 8),
    "weighted": lambda length, seed: Weighted(np.arange(length) % 5 + 0.25, length, seed),
}
orders = pytest.mark.parametrize("kind", ORDERS)


def whole(length: int, seed: int = 0, epoch: int = 0, kind: str = "shuffle") -> Indices:
    return ORDERS[kind](length, seed)(epoch, np.arange(length))


def assert_permutation(indices: Indices, length: int) -> None:
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(length))


def assert_fits(counts: Any, expected: Any, freedom: int, factor: float = 1.0) -> None:
    """Chi-square is within five standard deviations of what chance gives; the seeds are fixed."""
    statistic = factor * ((np.asarray(counts) - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_permutation_at_every_small_length(seed: int) -> None:
    for length in range(301):
        assert_permutation(whole(length, seed, epoch=length), length)


@pytest.mark.parametrize(
    "length", [997, 1024, 9_973, 10_000, 65_536, 65_537, 99_855, 99_856, 99_857, 1_000_003]
)
def test_permutation_at_large_prime_and_square_lengths(length: int) -> None:
    assert_permutation(whole(length), length)


@pytest.mark.parametrize("length", [2, 9, 289, 10_000])
@pytest.mark.parametrize("low_bits", [0, 7, 63])
def test_permutation_whatever_the_hash_gives(
    monkeypatch: pytest.MonkeyPatch, length: int, low_bits: int
) -> None:
    """Every round can be undone for any hash, also one close to 2^64, where sums wrap around."""
    monkeypatch.setattr(order, "mix", lambda x: ~(x & np.uint64(low_bits)))
    assert_permutation(whole(length), length)


@orders
@law
@given(length=st.integers(1, 3000), seed=seeds, epoch=epochs, data=st.data())
def test_positions_stand_alone(
    kind: str, length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """Seeking equals a slice of the whole, and how positions are batched changes nothing."""
    made, everything = ORDERS[kind](length, seed), whole(length, seed, epoch, kind)
    if kind == "shuffle":
        assert_permutation(everything, length)
    assert everything.min() >= 0 and everything.max() < length
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    for start, stop in itertools.pairwise([0, *cuts, length]):
        assert np.array_equal(made(epoch, np.arange(start, stop)), everything[start:stop])
    some = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=9)), dtype=np.int64)
    before = some.copy()
    assert np.array_equal(made(epoch, some), everything[before])
    assert np.array_equal(some, before)  # not changed


@orders
@law
@given(length=st.integers(40, 500), seed=seeds, epoch=epochs)
def test_epochs_and_seeds_differ(kind: str, length: int, seed: int, epoch: int) -> None:
    places = [(seed, epoch), (seed, epoch + 1), ((seed + 1) % 2**32, epoch)]
    found = {tuple(whole(length, *place, kind).tolist()) for place in places}
    assert len(found | {tuple(range(length))}) == 4


@pytest.mark.parametrize("length", [2, 3, 5, 12, 16, 31])
def test_every_sample_comes_to_every_position_equally_often(length: int) -> None:
    many = 1500
    counts = np.zeros((length, length))
    for epoch in range(many):
        counts[np.arange(length), whole(length, 7, epoch)] += 1
    # Rows and columns of the table are fixed: hence (n - 1)^2 degrees of freedom and the factor.
    assert_fits(counts, many / length, (length - 1) ** 2, (length - 1) / length)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_every_order_of_a_few_samples_comes_equally_often(length: int) -> None:
    many = 2400
    found = Counter(tuple(whole(length, 7, epoch).tolist()) for epoch in range(many))
    counts = [found[one] for one in itertools.permutations(range(length))]
    assert_fits(counts, many / len(counts), len(counts) - 1)


@pytest.mark.parametrize(("length", "bins"), [(50, 50), (1797, 30), (10**9, 50)])
def test_any_sample_may_come_first(length: int, bins: int) -> None:
    many = 2500
    shuffle, zero = Shuffle(length, 3), np.zeros(1, dtype=np.int64)
    first = np.array([shuffle(epoch, zero)[0] for epoch in range(many)])
    # Bins of a length that they do not divide differ in size.
    sizes = np.diff(-(-length * np.arange(bins + 1) // bins))
    counts = np.bincount(first * bins // length, minlength=bins)
    assert_fits(counts, many * sizes / length, bins - 1)


@pytest.mark.parametrize("length", [1000, 1024])
@pytest.mark.parametrize("lag", [1, 2, 32])
def test_no_correlation_between_positions_or_epochs(length: int, lag: int) -> None:
    many = 100
    orders = [whole(length, 5, epoch) for epoch in range(many + 1)]
    neighbours = [(one[:-lag], one[lag:]) for one in orders[:many]]
    deviation = 1 / math.sqrt(length)
    for pairs in (neighbours, itertools.pairwise(orders)):
        found = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])
        assert abs(found.mean()) < 5 * deviation / math.sqrt(many)
        assert np.abs(found).max() < 5 * deviation


@pytest.mark.parametrize("length", [10**9, 10**9 + 7, 2**31, 2**40 + 1, 10**12])
def test_huge_lengths_give_distinct_values_in_range(length: int) -> None:
    """No list of indices is made: these would not fit into memory."""
    shuffle = Shuffle(length, 0)
    for start in (0, length // 2, length - 20_000):
        indices = shuffle(1, np.arange(start, start + 20_000))
        assert indices.min() >= 0 and indices.max() < length
        assert len(np.unique(indices)) == 20_000


@pytest.mark.parametrize("length", [2, 7, 50])
def test_replacement_is_uniform_and_independent(length: int) -> None:
    many = 40_000
    drawn = make_order("replacement", None, length, 3, 8)(0, np.arange(many))
    assert_fits(np.bincount(drawn, minlength=length), many / length, length - 1)
    # Neighbours are drawn without regard to each other: every pair comes equally often.
    pairs = np.bincount(drawn[:-1:2] * length + drawn[1::2], minlength=length**2)
    assert_fits(pairs, many / 2 / length**2, length**2 - 1)


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [0, 5, 0, 1, 0], [1e-6, 1], [0.1] * 30, [7]])
def test_weighted_draws_follow_the_weights(weights: list[float]) -> None:
    many = 40_000
    drawn = Weighted(weights, len(weights), 3)(0, np.arange(many))
    counts = np.bincount(drawn, minlength=len(weights))
    share = np.asarray(weights) / sum(weights)
    assert counts[share == 0].sum() == 0
    expected = many * share
    deviation = np.sqrt(expected * (1 - share))
    assert (np.abs(counts - expected) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("drawn", [0.0, 0.25, 0.5, 1 - 2.0**-53])
def test_a_weight_of_zero_is_never_drawn_even_on_an_edge(
    drawn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "uniform", lambda *_: np.array([drawn]))
    weights = [0, 1, 0, 0, 1, 2, 0]
    (index,) = Weighted(weights, len(weights), 0)(0, np.zeros(1, np.int64))
    assert weights[index] > 0


def test_the_sampler_names_the_order_and_sequential_is_the_data_sets_own() -> None:
    dataset = SimpleNamespace(weights=[1, 2, 3])
    for sampler, kind in (("shuffle", Shuffle), ("weighted", Weighted)):
        made = make_order(sampler, dataset, 3, 5, 8)
        assert type(made) is kind and made.seed == 5  # type: ignore[attr-defined]
    assert make_order("sequential", dataset, 3, 5, 8) is sequential
    assert sequential(4, np.array([3, 1, 9])).tolist() == [3, 1, 9]


@pytest.mark.parametrize(
    "weights",
    [None, [1, 2], [1, -1, 1], [1, math.nan, 1], [1, math.inf, 1], [[1, 2, 3]], [0, 0, 0]],
    ids=str,
)
def test_weighted_needs_the_data_sets_weights(weights: Any) -> None:
    dataset = SimpleNamespace() if weights is None else SimpleNamespace(weights=weights)
    told = "TRAIN.SAMPLER weighted .*`weights`: one finite number of at least 0 .* 3 samples"
    with pytest.raises(UsageError, match=told):
        make_order("weighted", dataset, 3, 0, 8)


class Owned:
    """Its order gives `made` of (epoch, positions)."""

    def __init__(self, made: Callable[[int, Indices], Any]) -> None:
        self.order = made


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list, np.uint8])
def test_the_data_sets_own_order_is_taken(kind: Any) -> None:
    asked = []

    def turned(epoch: int, positions: Indices) -> Any:
        asked.append((epoch, positions.dtype, positions.shape))
        return kind((9 - positions + epoch) % 10)

    made = make_order("dataset", Owned(turned), 10, 0, 4)
    found = made(3, np.array([2, 9, 5]))
    assert found.dtype == np.int64 and found.tolist() == [0, 3, 7]
    assert asked == [(3, np.int64, (3,))]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([0, 1, 10], r"int64 of shape \(3,\), \[10\] in it"),
        ([0, -1, 3], r"int64 of shape \(3,\), \[-1\] in it"),
        ([0, 1], r"int64 of shape \(2,\), \[\] in it"),
        ([[0, 1, 2]], r"int64 of shape \(1, 3\), \[\] in it"),
        (5, r"int64 of shape \(\), \[\] in it"),
        (None, r"object of shape \(\), \[None\] in it"),
        ([0.0, 1.0, 2.0], r"float64 of shape \(3,\), \[0\.0, 1\.0, 2\.0\] in it"),
    ],
    ids=str,
)
def test_an_own_order_that_is_none_is_refused(returned: Any, told: str) -> None:
    made = make_order("dataset", Owned(lambda *_: returned), 10, 0, 4)
    expected = r"expected are integers of shape \(3,\), at least 0 and below 10"
    with pytest.raises(
        RunError, match=rf"Owned\.order\(2, positions\) returned {told}; {expected}"
    ):
        made(2, np.arange(3))


def test_a_data_set_without_an_order_is_refused() -> None:
    for dataset in (SimpleNamespace(), SimpleNamespace(order=[1, 2, 3])):
        with pytest.raises(UsageError, match=r"no order\(epoch, positions\)") as caught:
            make_order("dataset", dataset, 3, 0, 4)
        assert caught.value.exit_code == 2
