"""Smoothing as TensorBoard does it, and pictures of curves."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.runs.plot import plot, smooth
from launcher.runs.run import open_run, open_runs
from tests.runs.made import make_run, record, training

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
WEIGHTS = st.floats(0, 0.999)


def test_known_values() -> None:
    """The debiased average: each value weighs what it would if the series had always been so."""
    assert smooth(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == pytest.approx(
        [1.0, (0.25 * 1 + 0.5 * 2) / 0.75, (0.125 * 1 + 0.25 * 2 + 0.5 * 4) / 0.875]
    )


@given(VALUES, WEIGHTS)
def test_it_is_an_average_of_what_came_so_far(values: list[float], weight: float) -> None:
    found = smooth(np.array(values), weight)
    for place, value in enumerate(found):
        weights = [(1 - weight) * weight ** (place - i) for i in range(place + 1)]
        expected = math.fsum(w * v for w, v in zip(weights, values, strict=False)) / math.fsum(
            weights
        )
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-3)
        low, high = min(values[: place + 1]), max(values[: place + 1])
        assert low - 1e-3 <= value <= high + 1e-3
    assert found[0] == pytest.approx(values[0])


@given(st.floats(-1e6, 1e6), st.integers(1, 200), WEIGHTS)
def test_a_constant_stays(value: float, count: int, weight: float) -> None:
    assert smooth(np.full(count, value), weight).tolist() == pytest.approx([value] * count)


@given(VALUES)
def test_without_weight_nothing_changes(values: list[float]) -> None:
    assert smooth(np.array(values), 0).tolist() == values


def test_not_a_number_stays_and_counts_for_nothing() -> None:
    found = smooth(np.array([1.0, np.nan, 3.0]), 0.5)
    assert math.isnan(found[1])
    assert found[[0, 2]].tolist() == smooth(np.array([1.0, 3.0]), 0.5).tolist()


@pytest.mark.parametrize("x", ["step", "samples", "time"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures(x: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = open_runs([make_run(tmp_path / "a"), make_run(tmp_path / "$b_1$")])
    file = tmp_path / f"p.{suffix}"
    plot(runs, ["val/accuracy", "train/loss"], x, 0.6, file)
    if suffix == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    root = ElementTree.parse(file).getroot()
    told = "".join(root.itertext())
    label = "hours since the first record" if x == "time" else x
    assert all(word in told for word in ("val/accuracy", "train/loss", "a", "$b_1$", label))


def test_the_same_runs_give_the_same_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = open_run(make_run(tmp_path / "a"))
    for name in ("1.svg", "2.svg"):
        plot([run], ["train/loss"], "step", 0.0, tmp_path / name)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = open_run(make_run(tmp_path / "a", [*training(50), record(60, note=None)]))
    with pytest.raises(UsageError, match=r"no run has val/acuracy .* there are .*val/accuracy"):
        plot([run], ["val/acuracy"], "step", 0.0, tmp_path / "p.png")
    with pytest.raises(UsageError, match=r"must end in .png or .svg"):
        plot([run], ["val/accuracy"], "step", 0.0, tmp_path / "p.gif")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
