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


# 12 steps an epoch, 48 in all.
@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("SCHEDULE=constant", {0: 1, 24: 1, 48: 1}),
        ("SCHEDULE=linear", {0: 1, 12: 0.75, 24: 0.5, 48: 0}),
        ("SCHEDULE=linear FINAL_FACTOR=0.2", {0: 1, 24: 0.6, 48: 0.2}),
        ("SCHEDULE=cosine", {0: 1, 16: 0.75, 24: 0.5, 32: 0.25, 48: 0}),
        ("SCHEDULE=cosine FINAL_FACTOR=0.1", {0: 1, 24: 0.55, 48: 0.1}),
        (
            "SCHEDULE=step MILESTONES=[1ep,30step] GAMMA=0.5",
            {0: 1, 11: 1, 12: 0.5, 29: 0.5, 30: 0.25, 48: 0.25},
        ),
        ("WARMUP=1ep", {0: 1 / 13, 11: 12 / 13, 12: 1}),
        ("WARMUP=4step", {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1, 5: 1}),
        ("WARMUP=1ep SCHEDULE=cosine", {11: 12 / 13, 12: 1, 30: 0.5, 48: 0}),
        ("WARMUP=1ep SCHEDULE=step MILESTONES=[2ep]", {12: 1, 23: 1, 24: 0.1}),
    ],
)
def test_schedule_of_a_config(words: str, values: dict[int, float]) -> None:
    keys = [f"OPTIM.{word}" for word in words.split()]
    made = build_schedule(config("TRAIN.DURATION=4ep", *keys), object(), Plan(96, 8))
    assert {step: made(step) for step in values} == pytest.approx(values, abs=1e-12)


def test_apply_keeps_the_ratio_of_the_groups() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.4, 0.1)]
    optimizer = torch.optim.SGD(groups)
    made = Schedule(schedule.linear(0), 10)
    for step in (0, 5, 9, 2):  # rates come from the step alone, in any order
        made.apply(optimizer, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * (1 - step / 10), 0.1 * (1 - step / 10)])
