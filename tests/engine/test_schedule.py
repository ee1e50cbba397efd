"""Schedules as pure functions of the share of the run done, and of the step."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.plan import Plan
from launcher.engine import schedule
from launcher.engine.schedule import Factor, Schedule, build_schedule
from tests.engine.helpers import config

STEPS = schedule.step([0.3, 0.8], 0.1)


@pytest.mark.parametrize(
    ("factor", "values"),
    [
        (schedule.constant(), {0: 1, 0.5: 1, 1: 1}),
        (schedule.linear(0), {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        (schedule.linear(0.2), {0: 1, 0.5: 0.6, 1: 0.2}),
        (schedule.cosine(0), {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
        (schedule.cosine(0.1), {0: 1, 0.5: 0.55, 1: 0.1}),
        (STEPS, {0: 1, 0.29: 1, 0.3: 0.1, 0.79: 0.1, 0.8: 0.01, 1: 0.01}),
        (schedule.step([], 0.1), {0: 1, 1: 1}),
    ],
)
def test_factor(factor: Factor, values: dict[float, float]) -> None:
    for done, value in values.items():
        assert factor(done) == pytest.approx(value, abs=1e-12)


@settings(deadline=None)
@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    final=st.floats(0, 1),
    kind=st.sampled_from([schedule.linear, schedule.cosine]),
)
def test_warm_up_rises_and_the_rest_falls(
    total: int, warmup: int, final: float, kind: Callable[[float], Factor]
) -> None:
    made = Schedule(kind(final), total, warmup)
    values = [made(step) for step in range(total + 3)]
    assert all(0 <= value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    # Never multiplied: the schedule begins where the warm-up ends, at the full rate.
    left = max(total - warmup, 1)
    assert after == [kind(final)(min(s / left, 1)) for s in range(total + 3 - warmup)]


def test_warm_up_is_linear_and_never_zero() -> None:
    made = Schedule(schedule.constant(), 100, 4)
    assert [made(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("SCHEDULE=constant", {0: 1, 39: 1}),
        ("SCHEDULE=cosine", {0: 1, 20: 0.5, 40: 0}),
        ("SCHEDULE=linear FINAL_FACTOR=0.5", {0: 1, 20: 0.75, 40: 0.5}),
        (
            "SCHEDULE=step MILESTONES=[1ep,25step] GAMMA=0.5",
            {9: 1, 10: 0.5, 24: 0.5, 25: 0.25, 40: 0.25},
        ),
        ("WARMUP=1ep", {0: 1 / 11, 9: 10 / 11, 10: 1}),
        ("WARMUP=4step", {0: 0.2, 3: 0.8, 4: 1}),
        ("WARMUP=1ep SCHEDULE=cosine", {9: 10 / 11, 10: 1, 25: 0.5, 40: 0}),
        ("WARMUP=1ep SCHEDULE=step MILESTONES=[2ep]", {10: 1, 19: 1, 20: 0.1}),
    ],
)
def test_schedule_of_a_config(words: str, values: dict[int, float]) -> None:
    keys = [f"OPTIM.{word}" for word in words.split()]
    made = build_schedule(config("TRAIN.DURATION=4ep", *keys), Plan(80, 8))
    for step, value in values.items():
        assert made(step) == pytest.approx(value, abs=1e-12)


def test_apply_keeps_the_ratio_of_the_groups() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.4, 0.1)]
    optimizer = torch.optim.SGD(groups)
    made = Schedule(schedule.linear(0), 10)
    for step in (0, 5, 9, 2):  # rates come from the step alone, in any order
        made.apply(optimizer, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * (1 - step / 10), 0.1 * (1 - step / 10)])
