"""Which positions a rank takes: each exactly once, evenly shared, the same batches at any size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.plan import Plan, share
from launcher.errors import UsageError

law = settings(deadline=None, max_examples=150)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    batch_size = draw(st.integers(1, 40))
    drop_last = draw(st.booleans())
    length = draw(st.integers(batch_size if drop_last else 1, 120))
    world_size = draw(st.integers(1, 8))
    return Plan(length, batch_size, drop_last, world_size, draw(st.integers(0, 12)))


@law
@given(count=st.integers(0, 500), parts=st.integers(1, 40))
def test_shares_are_a_partition_and_differ_by_at_most_one(count: int, parts: int) -> None:
    shares = [share(count, parts, part) for part in range(parts)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


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
def test_ranks_share_a_batch_evenly(plan: Plan) -> None:
    for k in range(plan.steps_per_epoch):
        sizes = [
            sum(stop - start for start, stop in plan.micro_batches(k, rank))
            for rank in range(plan.world_size)
        ]
        start, stop = plan.batch(k)
        assert sum(sizes) == stop - start
        assert max(sizes) - min(sizes) <= 1


@law
@given(plan=plans())
def test_micro_batches_are_within_the_limit_and_even(plan: Plan) -> None:
    limit = plan.micro_batch_size or plan.batch_size
    for k in range(plan.steps_per_epoch):
        for rank in range(plan.world_size):
            sizes = [stop - start for start, stop in plan.micro_batches(k, rank)]
            assert all(0 < size <= limit for size in sizes)
            assert not sizes or max(sizes) - min(sizes) <= 1
            assert len(sizes) == -(-sum(sizes) // limit)  # no more of them than needed


@law
@given(plan=plans(), world_size=st.integers(1, 8), micro=st.integers(0, 12))
def test_global_batches_depend_on_length_and_batch_size_alone(
    plan: Plan, world_size: int, micro: int
) -> None:
    other = Plan(plan.length, plan.batch_size, plan.drop_last, world_size, micro)
    assert other.steps_per_epoch == plan.steps_per_epoch
    assert [other.batch(k) for k in range(plan.steps_per_epoch)] == [
        plan.batch(k) for k in range(plan.steps_per_epoch)
    ]


@pytest.mark.parametrize(
    ("length", "batch_size", "drop_last", "steps", "samples"),
    [(10, 4, False, 3, 10), (10, 4, True, 2, 8), (8, 4, True, 2, 8), (3, 64, False, 1, 3)],
)
def test_steps_and_samples_of_an_epoch(
    length: int, batch_size: int, drop_last: bool, steps: int, samples: int
) -> None:
    plan = Plan(length, batch_size, drop_last)
    assert (plan.steps_per_epoch, plan.samples_per_epoch) == (steps, samples)


def test_a_split_too_small_for_one_batch_is_told() -> None:
    with pytest.raises(UsageError, match=r"3 samples.*TRAIN\.DROP_LAST.*TRAIN\.BATCH_SIZE"):
        Plan(3, 4, drop_last=True)
