"""What samples draw is what they would draw if all generators were seeded before each of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.fetch import Fetcher, sample_seeds
from launcher.data.plan import Request
from launcher.edges import generators
from launcher.edges.generators import GENERATORS, seed_generators

# Ways in which people draw; some move a generator only now and then.
WAYS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "torch": lambda: torch.rand(()).item(),
    "torch normal": lambda: torch.randn(3).tolist(),
    "numpy": lambda: np.random.rand(),
    "numpy normal": lambda: np.random.normal(),
    "python": lambda: random.random(),
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.sample(range(9), 9),
    # As many words as a state has: the place among them is that of before.
    "numpy's whole state": lambda: np.random.randint(0, 1 << 32, 624, np.uint32).tolist(),
    "python's whole state": lambda: [random.getrandbits(32) for _ in range(624)],
    "torch's seed": lambda: np.random.default_rng(torch.initial_seed()).random(),
}


class Drawing:
    def __init__(self, ways: list[str]) -> None:
        self.ways, self.asked = ways, Counter[int]()

    def __getitem__(self, index: int) -> Any:
        self.asked[index] += 1
        return index, WAYS[self.ways[index % len(self.ways)]]()


def by_hand(ways: list[str], seed: int, epoch: int, indices: list[int], collate: Any) -> Any:
    """All generators seeded before each sample."""
    dataset, samples = Drawing(ways), []
    numbers = sample_seeds(seed, epoch, indices)
    for index, number in zip(indices, numbers, strict=True):
        seed_generators(number)
        samples.append(dataset[index])
    seed_generators(numbers[0] ^ 1)
    return collate(samples)


def states() -> list[Any]:
    name, words, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), name, words.tolist(), rest, random.getstate()]


def collates(way: str) -> Any:
    return lambda samples: (samples, WAYS[way]())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([*WAYS, *["nothing"] * 8]), min_size=1, max_size=9),
    st.sampled_from(["nothing", "nothing", "torch", "numpy", "gauss"]),
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 30), min_size=1, max_size=4),
            st.integers(0, 2),
            st.sampled_from(list(WAYS)),  # what the process itself draws before
        ),
        min_size=1,
        max_size=7,
    ),
)
def test_it_is_as_if_all_were_seeded(
    ways: list[str], collate: str, batches: list[tuple[list[int], int, str]]
) -> None:
    fetcher = Fetcher(Drawing(ways), collates(collate), 7)
    for indices, epoch, own in batches:
        WAYS[own]()
        before = states()
        assert (found := fetcher[Request(epoch, indices)]) and states() == before
        assert found == by_hand(ways, 7, epoch, indices, collates(collate))


@pytest.mark.parametrize("way", WAYS)
def test_no_sample_is_asked_for_twice(way: str) -> None:
    dataset = Drawing([way])
    fetcher = Fetcher(dataset, list, 7)
    for start in range(0, 12, 4):
        fetcher[Request(0, list(range(start, start + 4)))]
    assert set(dataset.asked.values()) == {1}
    used = {"nothing": 0}.get(way, 1)
    assert fetcher.seeding.used is not None and len(fetcher.seeding.used) == used


def test_a_batch_that_draws_unlike_those_before_is_made_again_and_those_after_are_not() -> None:
    dataset = Drawing(["nothing"] * 5 + ["numpy"] + ["nothing"] * 2)
    fetcher = Fetcher(dataset, list, 7)
    for start in range(0, 16, 2):
        fetcher[Request(0, [start, start + 1])]
    assert dataset.asked == Counter(range(16)) + Counter([4, 5])


def test_samples_come_at_once_where_the_data_set_has_a_way_and_draws_nothing() -> None:
    class Whole(Drawing):
        batches = 0

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.batches += 1
            return [self[i] for i in indices]

    for way, expected in (("nothing", 3), ("torch", 0)):
        dataset = Whole([way])
        fetcher = Fetcher(dataset, list, 7)
        for start in range(0, 12, 3):
            fetcher[Request(0, list(range(start, start + 3)))]
        assert dataset.batches == expected and set(dataset.asked.values()) == {1}


def test_other_generators_and_pythons_are_looked_at_the_long_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GENERATORS[1], "generator", None)
    monkeypatch.setattr(GENERATORS[2], "memory", None)
    monkeypatch.setattr(generators, "_memory", lambda generator: None)
    for way in WAYS:
        fetcher = Fetcher(Drawing(["nothing", "nothing", way]), list, 7)
        for indices in ([0, 1], [3, 4], [0, 1, 2], [5, 3]):
            before = states()
            found = fetcher[Request(0, indices)]
            assert states() == before
            assert found == by_hand(["nothing", "nothing", way], 7, 0, indices, list)


@pytest.mark.parametrize("way", ["numpy normal", "gauss"])
def test_the_number_of_a_pair_that_the_process_has_left_over_is_not_given_away(way: str) -> None:
    """It is drawn without moving the generator."""
    fetcher = Fetcher(Drawing(["nothing", "nothing", way]), list, 7)
    fetcher[Request(0, [0, 1])]
    for indices in ([0, 1], [2, 3], [5, 6]):
        random.seed(0)
        np.random.seed(0)
        WAYS[way]()
        before = states()
        found = fetcher[Request(0, indices)]
        assert states() == before
        assert found == by_hand(["nothing", "nothing", way], 7, 0, indices, list)


def test_a_failure_leaves_the_generators_as_they_were() -> None:
    class Failing(Drawing):
        def __getitem__(self, index: int) -> Any:
            found = super().__getitem__(index), WAYS["shuffle"](), WAYS["torch"]()
            if index == 3:
                raise ValueError
            return found

    for batches in ([[3]], [[0, 1], [2, 3]]):
        fetcher = Fetcher(Failing(["numpy"]), list, 7)
        before = states()
        with pytest.raises(Exception, match="sample 3"):
            for indices in batches:
                fetcher[Request(0, indices)]
        assert states() == before
        assert torch.initial_seed.__module__ == "torch.random"
