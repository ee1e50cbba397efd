"""Batches of one group or of similar length: every sample once an epoch, found at any position."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.grouped import grouped
from launcher.data.order import Indices, Order, make_order
from launcher.data.plan import Plan, train_requests
from launcher.errors import UsageError

law = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 10**6)
batch_sizes = st.integers(1, 20)


def by(values: Any, batch_size: int, seed: int = 0, name: str = "groups") -> Order:
    dataset = SimpleNamespace(**{name: values})
    return make_order("grouped", dataset, len(values), seed, batch_size)


def whole(order: Order, length: int, epoch: int = 0) -> Indices:
    made = order(epoch, np.arange(length))
    assert made.dtype == np.int64 and np.array_equal(np.sort(made), np.arange(length))
    return made


def cut(values: Any, batch_size: int) -> list[Any]:
    return [values[i : i + batch_size] for i in range(0, len(values), batch_size)]


@law
@given(st.lists(st.integers(-3, 5), min_size=1, max_size=200), batch_sizes, seeds, epochs)
def test_full_batches_are_of_one_group_and_rests_come_last_group_after_group(
    groups: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    found = np.asarray(groups)[whole(by(groups, batch_size, seed), len(groups), epoch)]
    counts = {g: groups.count(g) for g in sorted(set(groups))}
    full = sum(count // batch_size for count in counts.values())
    batches = cut(found.tolist(), batch_size)
    assert all(len(set(batch)) == 1 for batch in batches[:full])
    for g, count in counts.items():
        assert sum(batch[0] == g for batch in batches[:full]) == count // batch_size
    rest = [[g] * (count % batch_size) for g, count in counts.items()]
    assert [*itertools.chain(*batches[full:])] == [*itertools.chain(*rest)]


@pytest.mark.parametrize("name", ["groups", "lengths"])
@law
@given(
    values=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    batch_size=batch_sizes,
    seed=seeds,
    epoch=epochs,
    data=st.data(),
)
def test_positions_stand_alone(
    name: str, values: list[int], batch_size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    length = len(values)
    everything = whole(by(values, batch_size, seed, name), length, epoch)
    order = by(values, batch_size, seed, name)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    for start, stop in itertools.pairwise([0, *cuts, length]):
        assert np.array_equal(order(epoch, np.arange(start, stop)), everything[start:stop])
    some = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=9)), dtype=np.int64)
    before = some.copy()
    assert np.array_equal(order(epoch, some), everything[before])
    assert np.array_equal(some, before)  # not changed


@law
@given(st.integers(1, 1500), batch_sizes, seeds, epochs)
def test_a_batch_holds_samples_of_similar_length(
    length: int, batch_size: int, seed: int, epoch: int
) -> None:
    """From one fiftieth of the lengths, or from neighbouring two full batches of a short epoch."""
    lengths = np.random.default_rng(seed).permutation(length) * 0.5
    found = lengths[whole(by(lengths, batch_size, seed, "lengths"), length, epoch)]
    batches = -(-length // batch_size)
    widest = -(-batches // min(50, max(1, batches // 2))) * batch_size
    for batch in cut(2 * found, batch_size):
        assert max(batch) - min(batch) < widest
    if length % batch_size:  # what is smaller comes last
        assert len(cut(found, batch_size)[-1]) == length % batch_size


def test_samples_of_one_length_are_mixed_however_the_data_set_is_sorted() -> None:
    lengths, classes = np.arange(4800) % 20, np.arange(4800) // 1200
    for batch in cut(classes[whole(by(lengths, 32, name="lengths"), 4800)], 32):
        assert np.bincount(batch).max() < 24  # 20 in the worst of 150 by chance; all if by place


@pytest.mark.parametrize("name", ["groups", "lengths"])
def test_epochs_seeds_and_groups_differ(name: str) -> None:
    values = np.arange(96) // 24
    places = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    orders = [whole(by(values, 8, seed, name), 96, epoch) for seed, epoch in places]
    # Neither the order of the batches nor who is in them is that of another epoch or seed.
    for one, other in itertools.combinations(orders, 2):
        assert not np.array_equal(values[one[::8]], values[other[::8]])
        assert {frozenset(b) for b in cut(one, 8)}.isdisjoint(frozenset(b) for b in cut(other, 8))
    # Nor are groups of equal size shuffled alike.
    if name == "groups":
        assert len({tuple(one[values[one] == g] % 24) for one in orders for g in range(4)}) == 24


def test_who_is_left_over_changes_and_batches_of_all_groups_are_mixed() -> None:
    values = np.arange(1000) % 3
    order = by(values, 16)
    left = [frozenset(whole(order, 1000, epoch)[-(1000 % 16) :]) for epoch in range(5)]
    assert len(set(left)) == 5
    firsts = values[whole(order, 1000)[: 16 * 60 : 16]]
    assert 20 < (firsts[1:] != firsts[:-1]).sum() < 59  # of 59; two thirds by chance


@pytest.mark.parametrize("name", ["groups", "lengths"])
@pytest.mark.parametrize("micro", [0, 3])
def test_the_global_batches_are_those_of_one_rank(name: str, micro: int) -> None:
    values = (np.arange(203) * 7) % 5
    found = []
    for ranks in (1, 2, 3):
        plan = Plan(203, 10, False, ranks, micro)
        steps = 2 * plan.steps_per_epoch
        batches: list[list[int]] = [[] for _ in range(steps)]
        for rank in range(ranks):
            for step in range(steps):
                requests = train_requests(plan, by(values, 10, 7, name), rank, step, step + 1)
                batches[step] += [i for request in requests for i in request.samples]
        found.append(batches)
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 10


def test_groups_win_over_lengths_and_may_be_of_any_whole_numbers() -> None:
    groups = [7, -2, 7, -2] * 9
    lengths = list(range(36))
    both = SimpleNamespace(groups=np.array(groups, np.int8), lengths=lengths)
    expected = whole(by(groups, 4, 3), 36)
    assert np.array_equal(whole(grouped(both, 36, 4, 3), 36), expected)
    assert np.array_equal(whole(by(np.array(groups) > 0, 4, 3), 36), expected)
    none = SimpleNamespace(groups=None, lengths=lengths)
    assert np.array_equal(
        whole(grouped(none, 36, 4, 3), 36), whole(by(lengths, 4, 3, "lengths"), 36)
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"groups": [1, 2]},
        {"groups": [0.0, 1.0, 2.0]},
        {"groups": [[1, 2, 3]]},
        {"groups": [[1], [2, 3], [4]]},
        {"groups": ["a", "b", "c"], "lengths": [1, 2, 3]},
        {"lengths": [1, 2, 3, 4]},
        {"lengths": [1.0, np.nan, 3.0]},
        {"lengths": [1.0, np.inf, 3.0]},
        {"lengths": len},
    ],
    ids=str,
)
def test_grouped_needs_the_data_sets_groups_or_lengths(values: dict[str, Any]) -> None:
    told = "TRAIN.SAMPLER grouped .*`groups`, one integer .* 3 samples, or `lengths`, one finite"
    with pytest.raises(UsageError, match=told) as caught:
        make_order("grouped", SimpleNamespace(**values), 3, 0, 2)
    assert caught.value.exit_code == 2
