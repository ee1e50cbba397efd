"""Which positions a rank takes: each exactly once, evenly shared, the same batches at any size."""

from itertools import chain, islice, pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import plan as plan_module
from launcher.data.order import Indices, Shuffle
from launcher.data.plan import Plan, dealt, train_requests
from launcher.errors import UsageError
from tests.data.helpers import plans

law = settings(deadline=None, max_examples=150)


def micro_batch_sizes(plan: Plan, k: int, rank: int) -> list[int]:
    return [stop - start for start, stop in plan.micro_batches(k, rank)]


@law
@given(plan=plans())
def test_every_position_comes_exactly_once_an_epoch(plan: Plan) -> None:
    seen = [
        position
        for k in range(plan.steps_per_epoch)
        for rank in range(plan.world_size)
        for start, stop in plan.micro_batches(k, rank)
        for position in range(start, stop)
    ]
    assert seen == list(range(plan.samples_per_epoch))
    left_out = plan.length - plan.samples_per_epoch
    assert left_out == (plan.length % plan.batch_size if plan.drop_last else 0)


@law
@given(plan=plans())
def test_ranks_share_a_batch_evenly_and_cut_it_evenly_within_the_limit(plan: Plan) -> None:
    limit = plan.micro_batch_size or plan.batch_size
    for k in range(plan.steps_per_epoch):
        shares = [micro_batch_sizes(plan, k, rank) for rank in range(plan.world_size)]
        start, stop = plan.batch(k)
        counts = [sum(sizes) for sizes in shares]
        assert sum(counts) == stop - start
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
        for sizes in shares:
            assert all(0 < size <= limit for size in sizes)
            assert not sizes or max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            assert len(sizes) == -(-sum(sizes) // limit)  # no more of them than needed


def test_a_split_too_small_for_one_batch_is_told() -> None:
    with pytest.raises(UsageError, match=r"3 samples.*TRAIN\.DROP_LAST.*TRAIN\.BATCH_SIZE"):
        Plan(3, 4, drop_last=True)


def plain_batch(plan: Plan, step: int) -> list[tuple[int, int]]:
    """The (epoch, sample)s of a global batch, written down the plain way: shuffle an epoch, cut it.
    Knows of neither ranks nor micro-batches."""
    whole, odd = divmod(plan.length, plan.batch_size)
    epoch, k = divmod(step, whole if plan.drop_last or not odd else whole + 1)
    samples = Shuffle(plan.length, 11)(epoch, np.arange(plan.length)).tolist()
    return [(epoch, i) for i in samples[k * plan.batch_size : (k + 1) * plan.batch_size]]


@law
@given(plan=plans(), first=st.integers(0, 30), count=st.integers(0, 12), at_once=st.integers(1, 64))
def test_any_rank_count_from_any_batch_on_gives_the_same_global_batches(
    plan: Plan, first: int, count: int, at_once: int
) -> None:
    """And nothing before `first` is even computed."""
    asked: list[tuple[int, int]] = []

    def watched(epoch: int, positions: Indices) -> Indices:
        asked.extend((epoch, position) for position in positions.tolist())
        return Shuffle(plan.length, 11)(epoch, positions)

    steps: dict[int, list[Any]] = {step: [] for step in range(first, first + count)}
    with mock.patch.object(plan_module, "POSITIONS_AT_ONCE", at_once):
        for rank in range(plan.world_size):
            requests = train_requests(plan, watched, rank, first, first + count)
            for step, samples in steps.items():
                sizes = micro_batch_sizes(plan, step % plan.steps_per_epoch, rank)
                own = list(islice(requests, len(sizes)))
                assert [len(request.samples) for request in own] == sizes
                samples += [(request.epoch, i) for request in own for i in request.samples]
            assert next(requests, None) is None
    assert steps == {step: plain_batch(plan, step) for step in steps}
    epoch, k = divmod(first, plan.steps_per_epoch)
    assert all(place >= (epoch, plan.batch(k)[0]) for place in asked)


def test_seeking_far_into_an_endless_run_is_immediate() -> None:
    plan = Plan(10**9, 256, world_size=8)
    first = 10**12
    request = next(train_requests(plan, Shuffle(10**9, 0), 3, first, 1 << 62))
    assert request.epoch == first // plan.steps_per_epoch
    assert len(request.samples) == 32


@law
@given(length=st.integers(1, 100), batch_size=st.integers(1, 30), world_size=st.integers(1, 8))
def test_evaluation_deals_whole_batches_and_every_sample_once(
    length: int, batch_size: int, world_size: int
) -> None:
    plan = Plan(length, batch_size, world_size=world_size)
    for rank in range(world_size):
        numbers = list(range(rank, plan.steps_per_epoch, world_size))
        assert dealt(plan, rank) == [(k, True) for k in numbers]
    alone = (range(*plan.batch(k)) for k, _ in dealt(Plan(length, batch_size), 0))
    assert list(chain(*alone)) == list(range(length))


@law
@given(
    length=st.integers(1, 100),
    batch_size=st.integers(1, 30),
    world_size=st.integers(1, 8),
    shares=st.integers(1, 9),
)
def test_shares_of_an_evaluation_stay_whole_on_one_rank(
    length: int, batch_size: int, world_size: int, shares: int
) -> None:
    plan = Plan(length, batch_size, world_size=world_size)
    alone = dealt(Plan(length, batch_size), 0, shares)
    ranks = [dealt(plan, rank, shares) for rank in range(world_size)]
    assert sorted(chain(*ranks)) == alone  # where they begin is the same at any number of ranks
    assert [k for k, _ in alone] == list(range(plan.steps_per_epoch))
    assert sum(begins for _, begins in alone) == min(shares, plan.steps_per_epoch)
    for numbers in ranks:  # a batch that begins nothing follows the one before it
        assert all(k == before + 1 for (before, _), (k, begins) in pairwise(numbers) if not begins)
    assert all(len(numbers) <= len(ranks[0]) for numbers in ranks)


@law
@given(plan=plans())
def test_odd_shares_are_known_before_the_first_step(plan: Plan) -> None:
    """Ranks with fewer micro-batches, and micro-batches of one: as found by going through an
    epoch."""
    everywhere = [
        [micro_batch_sizes(plan, k, rank) for rank in range(plan.world_size)]
        for k in range(plan.steps_per_epoch)
    ]
    counts = [[len(sizes) for sizes in batch] for batch in everywhere]
    batches = range(plan.steps_per_epoch)
    assert [plan.rounds(k) for k in batches] == [max(of) for of in counts]
    assert [plan.full_rounds(k) for k in batches] == [min(of) for of in counts]
    assert plan.uneven is any(max(of) != min(of) for of in counts)
    assert plan.gives_one_sample is any(1 in sizes for batch in everywhere for sizes in batch)
