"""Sums of numbers are exact, in whatever order and parts they are added."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.edges.numbers import Sums

finite = st.floats(allow_nan=False, allow_infinity=False)
weights = st.one_of(st.integers(0, 300).map(float), st.floats(0, 1e9))
pairs = st.lists(st.tuples(finite, weights), min_size=1, max_size=30)


def added(numbers: list[tuple[float, float]]) -> Sums:
    sums = Sums()
    for value, weight in numbers:
        sums.add(["x"], [value], weight)
    return sums


@given(pairs, st.randoms(), st.integers(1, 5))
def test_a_mean_is_the_exact_one_rounded_once(numbers, random, parts) -> None:  # type: ignore[no-untyped-def]
    total = sum(Fraction(weight) for _, weight in numbers)
    expected = math.nan
    if total:
        expected = float(sum(Fraction(v) * Fraction(w) for v, w in numbers) / total)
    assert added(numbers).means() == pytest.approx({"x": expected}, rel=0, abs=0, nan_ok=True)
    mixed, merged = random.sample(numbers, len(numbers)), Sums()
    for part in range(parts):
        merged.merge(added(mixed[part::parts]).state())
    assert merged.means() == pytest.approx({"x": expected}, rel=0, abs=0, nan_ok=True)


@given(finite, st.lists(st.floats(1e-9, 1e9), min_size=1))
def test_equal_values_give_just_that(value: float, weights: list[float]) -> None:
    assert added([(value, weight) for weight in weights]).means() == {"x": value}


@pytest.mark.parametrize(
    ("numbers", "mean"),
    [
        ([(math.inf, 1.0), (2.0, 1.0)], math.inf),
        ([(-math.inf, 1.0), (2.0, 1.0)], -math.inf),
        ([(math.inf, 1.0), (-math.inf, 1.0)], math.nan),
        ([(math.nan, 1.0), (2.0, 1.0)], math.nan),
        ([(math.nan, 0.0), (2.0, 1.0)], 2.0),
        ([(3.0, math.inf)], math.nan),
        ([(3.0, 0.0)], math.nan),
    ],
    ids=str,
)
def test_what_is_not_finite(numbers: list[tuple[float, float]], mean: float) -> None:
    for sums in (added(numbers), Sums()):
        sums.merge(added(numbers if not sums.means() else []).state())
        assert sums.means() == pytest.approx({"x": mean}, nan_ok=True)


def test_the_size_does_not_grow_with_what_is_added() -> None:
    few, many = (added([(i / 7, 1.0) for i in range(count)]) for count in (100, 100_000))
    assert len(str(many.state())) <= len(str(few.state())) + 20


def test_values_of_a_network_are_taken_as_they_are() -> None:
    sums, loss = Sums(), torch.tensor(0.1, requires_grad=True)
    sums.add(["loss", "n"], [loss, torch.tensor(2**40, dtype=torch.int64)], torch.tensor(3))
    assert sums.means() == {"loss": loss.item(), "n": float(2**40)}


def test_what_is_cleared_is_gone() -> None:
    """Also what was read and not yet added up."""
    sums = Sums()
    sums.add(["a"], [1.0], 2.0)
    sums.clear()
    sums.add(["b"], [3.0], 1.0)
    assert sums.means() == {"b": 3.0}


def test_what_another_one_holds_is_taken_in() -> None:
    """As if all had been added to one, whether or not it was added up before."""
    one, other, whole = Sums(), Sums(), Sums()
    for number, sums in ((0.1, one), (0.2, other), (0.3, other)):
        for each in (sums, whole):
            each.add(["a"], [number], number)
    other.means()
    other.add(["b"], [5.0], 1.0)
    whole.add(["b"], [5.0], 1.0)
    one.absorb(other)
    assert one.state() == whole.state()
