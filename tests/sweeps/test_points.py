"""Grids and draws."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.sweeps.points import names, settings_of, split


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.03", ["0.1", "0.03"]),
        ("sgd, adamw", ["sgd", "adamw"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("[],[[1,2],3]", ["[]", "[[1,2],3]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        (",5ep", ["", "5ep"]),
    ],
)
def test_a_list_of_values(text: str, values: list[str]) -> None:
    assert split(text) == values


def test_a_grid_is_the_product() -> None:
    found = settings_of(["A=1,2", "B.C=x,y,z"], [], 0)
    assert found == [{"A": a, "B.C": b} for a, b in itertools.product("12", "xyz")]


def test_each_draw_is_taken_at_each_point_of_the_grid() -> None:
    found = settings_of(["A=1,2"], ["3", "B=uniform(0,1)"], 5)
    drawn = [one["B"] for one in settings_of([], ["3", "B=uniform(0,1)"], 5)]
    assert [(one["A"], one["B"]) for one in found] == [*itertools.product("12", drawn)]


def test_a_key_draws_from_a_sequence_of_its_own() -> None:
    def drawn(*words: str, seed: int = 0) -> list[str]:
        return [one["B"] for one in settings_of([], list(words), seed)]

    first = drawn("4", "B=uniform(0,1)")
    assert drawn("4", "A=int(1,9)", "B=uniform(0,1)") == first
    assert drawn("9", "B=uniform(0,1)")[:4] == first
    assert drawn("4", "B=uniform(0,1)", seed=1) != first
    # What was drawn once is drawn for ever, by any Python.
    assert first == ["0.3304", "0.1637", "0.1837", "0.268"]


@given(
    low=st.floats(1e-9, 1e3), times=st.floats(1.1, 1e6), seed=st.integers(0, 99), count=st.just(40)
)
def test_log_draws_evenly_between_the_logarithms(
    low: float, times: float, seed: int, count: int
) -> None:
    high = low * times
    values = [float(p["A"]) for p in settings_of([], [f"{count}", f"A=log({low},{high})"], seed)]
    assert all(low * 0.999 <= value <= high * 1.001 for value in values)
    below = sum(math.log(value / low) < math.log(times) / 2 for value in values)
    assert 5 <= below <= 35  # of 40, each way: one in a million would not be


def test_whole_numbers_and_choices_have_both_ends() -> None:
    found = settings_of([], ["60", "A=int(-1,2)", "B=choice(a,[b,c],)"], 0)
    assert {one["A"] for one in found} == {"-1", "0", "1", "2"}
    assert {one["B"] for one in found} == {"a", "[b,c]", ""}


@pytest.mark.parametrize(
    ("grid", "draws", "told"),
    [
        (["A"], [], "--grid A: write KEY=A,B"),
        (["A=1", "A=2"], [], "A is given twice"),
        (["A=1"], ["2", "A=int(1,9)"], "A is given twice"),
        ([], ["A=int(1,9)"], "write --random N KEY=FORM"),
        ([], ["0", "A=int(1,9)"], "write --random N KEY=FORM"),
        ([], ["3"], "write --random N KEY=FORM"),
        ([], ["3", "A=1,2"], r"A=1,2: write log\(A,B\)"),
        ([], ["3", "A=log(0,1)"], "log takes numbers above 0"),
        ([], ["3", "A=uniform(1,1)"], "must be below the second"),
        ([], ["3", "A=uniform(0,inf)"], "must be below the second"),
        ([], ["3", "A=uniform(1)"], "uniform takes two numbers"),
        ([], ["3", "A=int(1,2.5)"], "int takes two whole numbers"),
    ],
)
def test_mistakes(grid: list[str], draws: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        settings_of(grid, draws, 0)


def test_names_sort_as_they_count() -> None:
    for count in (1, 999, 1000, 1001):
        found = list(names(count))
        assert len(set(found)) == count and sorted(found) == found
