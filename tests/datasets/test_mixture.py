"""Mixture: exact shares an epoch, and every sample of a source once before any comes again."""

import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from launcher.datasets import Mixture
from launcher.errors import UsageError

law = settings(deadline=None, max_examples=25)


class Source(Dataset):
    """A sample is the source's name, its index, and the pass that was told."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length, self.epoch = name, length, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        return self.name, index, self.epoch


class Whole(Source):
    deterministic = True

    def __getitems__(self, indices: list[int]) -> list[tuple[str, int, int]]:
        return [self[index] for index in indices]


def epoch_of(mixture: Mixture, epoch: int) -> list[Any]:
    mixture.set_epoch(epoch)
    return [mixture[i] for i in range(len(mixture))]


@law
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(40, 60),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_shares_are_exact_and_each_source_is_gone_through_before_it_begins_again(
    sources: list[tuple[int, int]], length: int, seed: int, epochs: int
) -> None:
    weights = [weight for _, weight in sources]
    weights[0] += not any(weights)
    mixture = Mixture(
        [Source(f"{i}", n) for i, (n, _) in enumerate(sources)], weights, length, seed
    )
    # Largest remainders, by hand.
    shares = [weight * length / sum(weights) for weight in weights]
    assert sum(mixture.counts) == length
    for count, share in zip(mixture.counts, shares, strict=True):
        assert abs(count - share) < 1
    taken: list[Any] = []
    for epoch in range(epochs):
        whole = epoch_of(mixture, epoch)
        drawn = Counter(name for name, _, _ in whole)
        assert [drawn[f"{i}"] for i in range(len(sources))] == mixture.counts
        taken += whole
        assert mixture.__getitems__(list(range(length))) == whole
    for i, (n, _) in enumerate(sources):
        passes = Counter((turn, index) for name, index, turn in taken if name == f"{i}")
        many = epochs * mixture.counts[i]
        # Told its passes, each of which has every sample once; the last one only some.
        assert set(passes.values()) <= {1}
        assert Counter(turn for turn, _ in passes) == Counter(t // n for t in range(many))


def test_an_index_stands_alone() -> None:
    """Whatever was asked before, in a copy too."""
    mixture = Mixture([Source("a", 7), Whole("b", 5)], [2, 1], 20, seed=4)
    found = [epoch_of(mixture, epoch) for epoch in range(4)]
    for epoch, index in [(3, 19), (0, 0), (2, 11), (2, 3), (1, 19)]:
        other = pickle.loads(pickle.dumps(mixture))
        other.set_epoch(epoch)
        assert other[index] == found[epoch][index]
    assert found[0] != found[1] and len({str(e) for e in found}) == 4
    assert epoch_of(Mixture([Source("a", 7), Whole("b", 5)], [2, 1], 20, seed=5), 0) != found[0]


def test_passes_differ_and_are_no_ones_elses() -> None:
    """Of sources of one length too."""
    mixture = Mixture([Source("a", 50), Source("b", 50)], [1, 1], 100)
    in_order = sorted(range(100), key=lambda i: i * mixture.step % 100)
    orders = []
    for epoch in range(3):
        mixture.set_epoch(epoch)
        indices = [mixture[i][1] for i in in_order]
        orders += [tuple(indices[:50]), tuple(indices[50:])]
    assert len(set(orders)) == 6 and tuple(range(50)) not in orders


def test_read_in_order_every_stretch_holds_about_its_share() -> None:
    mixture = Mixture([Source("a", 10), Source("b", 10), Source("c", 10)], [6, 3, 1], 1000)
    names = np.array([name for name, _, _ in epoch_of(mixture, 0)])
    for start in range(0, 1000, 50):
        part = Counter(names[start : start + 50].tolist())
        assert abs(part["a"] - 30) <= 3 and abs(part["b"] - 15) <= 3 and abs(part["c"] - 5) <= 3


def test_remainders_go_to_the_largest() -> None:
    sources = [Source(name, 3) for name in "abc"]
    assert Mixture(sources, [0.5, 0.3, 0.2], 11).counts == [6, 3, 2]  # 5.5, 3.3, 2.2
    assert Mixture(sources, [1, 1, 1], 11).counts == [4, 4, 3]
    assert Mixture(sources, [2, 0, 1], 9).counts == [6, 0, 3]


def test_names_and_a_source_that_stands_twice() -> None:
    same = Source("a", 4)
    mixture = Mixture({"x": same, "y": same}, {"y": 1, "x": 3}, 16)
    assert mixture.names == ["x", "y"] and mixture.counts == [12, 4]
    turns = Counter(turn for _, _, turn in epoch_of(mixture, 1))
    # x is in its passes 3 to 5, y in its second.
    assert turns == {3: 4, 4: 4, 5: 4, 1: 4}


def test_it_draws_nothing_where_no_source_does() -> None:
    assert Mixture([Whole("a", 2)], [1], 3).deterministic
    assert not Mixture([Whole("a", 2), Source("b", 2)], [1, 1], 3).deterministic
    with pytest.raises(IndexError):
        Mixture([Whole("a", 2)], [1], 3)[3]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


A, B = Source("a", 3), Source("b", 3)


@pytest.mark.parametrize(
    ("datasets", "weights", "length", "told"),
    [
        ([A, B], [1], 9, "1 weights for 2 data sets"),
        ([A, B], [1, -1], 9, "weight of 1 is -1"),
        ([A, B], [1, float("nan")], 9, "weight of 1 is nan"),
        ([A, B], [0, 0], 9, "no weight is above 0"),
        ([A, B], {"a": 1, "b": 2}, 9, "both lists, or both dicts"),
        ({"a": A, "b": B}, {"a": 1, "c": 2}, 9, "weights are of a, c; the data sets are a, b"),
        ({"a": A, "b": Source("b", 0)}, {"a": 1, "b": 2}, 9, "data set b is empty"),
        ([A, Dataset()], [1, 1], 9, "data set 1 has no length"),
        ([A, Stream()], [1, 1], 9, "data set 1 is iterable"),
        ([A, B], [1, 1], 0, "length must be at least 1, not 0"),
        ([], [], 9, "no weight is above 0"),
        ({"a": A, "b": B}, {"a": 1, "b": 0.001}, 9, "weight of b, 0.001, gives it no sample"),
    ],
)
def test_mixtures_that_make_no_sense(datasets: Any, weights: Any, length: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Mixture(datasets, weights, length)


def test_weights_may_be_of_any_kind_of_number() -> None:
    for weights in (np.array([2, 1], np.float32), torch.tensor([2.0, 1.0]), [2, True]):
        assert Mixture([A, B], weights, 9).counts == [6, 3]
