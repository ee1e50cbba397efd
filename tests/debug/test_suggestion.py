"""What the curve of a range test speaks for, on curves whose answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.debug.range_test import RangeTest
from launcher.debug.suggestion import suggest
from launcher.errors import UsageError

RATES = np.geomspace(1e-6, 10, 100)


def curve(fall_at: float, rise_at: float, height: float = 2.0, floor: float = 0.5) -> Any:
    """A loss that falls around one rate and rises without bound around another."""
    fallen = 1 / (1 + (RATES / fall_at) ** 2)
    return floor + height * fallen + height * np.minimum((RATES / rise_at) ** 4, 1e6)


@pytest.mark.parametrize("floor", [0.5, -30.0, 1e4])  # losses may be below 0
@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_the_steepest_fall_is_suggested(scatter: float, floor: float) -> None:
    noise = scatter * np.random.default_rng(3).standard_normal(100)
    found = suggest(RATES, curve(1e-3, 0.5, floor=floor) + noise)
    assert found.rate is not None and found.lowest is not None and found.rises is not None
    # By hand: of 1 / (1 + x^2) over the logarithm of x the slope is greatest at x = 1.
    assert 0.4e-3 < found.rate < 2.5e-3
    assert found.rate < found.lowest < found.rises and 0.2 < found.rises < 1


def test_an_end_that_is_not_finite_is_where_it_rises() -> None:
    losses = curve(1e-3, 1e9)
    losses[80:] = math.nan
    found = suggest(RATES, losses)
    assert found.rises == RATES[80] and found.rate is not None and found.rate < 2.5e-3


def test_a_loss_that_still_falls_says_so() -> None:
    found = suggest(RATES, curve(1e-3, 1e9))
    assert found.rises is None and "a higher --to may" in found.why


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (np.random.default_rng(4).standard_normal(100), "never falls clearly"),
        (np.full(100, 2.0), "never falls clearly"),
        (1 + RATES / 1e-6, "begin lower"),
        (np.r_[1.0, 2.0, 30.0, [math.inf] * 97], "only 3 losses are finite"),
        (np.full(100, math.nan), "only 0 losses are finite"),
    ],
)
def test_none_where_there_is_none(losses: Any, told: str) -> None:
    found = suggest(RATES, losses)
    assert found.rate is None and told in found.why


def made(**group: Any) -> RangeTest:
    optimizer = SimpleNamespace(param_groups=[group])
    run: Any = SimpleNamespace(optimizers={"": optimizer}, task=SimpleNamespace())
    return RangeTest(run, 1e-3, 1.0, 4, [])


def test_the_schedule_rises_by_one_factor_whatever_the_rate_was() -> None:
    test = made(lr=0.2, lr_scale=0.5)
    rates = [0.2 * 0.5 * test.run.task.schedule(step, 99) for step in range(5)]
    assert rates == pytest.approx([1e-3, 1e-2, 0.1, 1.0, 1.0])
    for group in ({"lr": 0.0}, {}):
        with pytest.raises(UsageError, match="no rate above 0"):
            made(**group)


def test_it_ends_where_the_loss_diverges_or_no_step_counts() -> None:
    test, losses = made(lr=1.0), [2.0, 1.5, 1.0, 1.0, 2.0, 90.0]
    asked = [test.on_record({"train/loss": loss, "train/lr": 1.0}) for loss in losses]
    assert asked == [None] * 5 + ["finish"]
    assert [loss for _, loss in test.curve] == losses[1:]  # each after an update
    assert made(lr=1.0).on_record({"train/loss": math.nan, "train/lr": 1.0}) == "finish"
    assert made(lr=1.0).on_record(None) is None
    skipped = [test.before_step(1) for _ in range(40)]  # by the gradient scaler
    assert skipped[27] is None and skipped[28] == "finish"
