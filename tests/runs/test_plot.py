"""Smoothing as TensorBoard does it, and pictures of curves."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.runs.plot import plot, smooth
from launcher.runs.run import open_run, open_runs
from tests.runs.made import make_run, record, training

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
WEIGHTS = st.floats(0, 0.999)


@given(VALUES, WEIGHTS)
@example([1.0, 2.0, 4.0], 0.5)
def test_it_is_an_average_of_what_came_so_far(values: list[float], weight: float) -> None:
    """The debiased one: each value weighs what it would if the series had always been so."""
    for place, value in enumerate(smooth(np.array(values), weight)):
        weights = [(1 - weight) * weight ** (place - i) for i in range(place + 1)]
        weighed = math.fsum(w * v for w, v in zip(weights, values, strict=False))
        assert value == pytest.approx(weighed / math.fsum(weights), rel=1e-6, abs=1e-6)


@given(VALUES)
def test_without_weight_nothing_changes(values: list[float]) -> None:
    assert smooth(np.array(values), 0).tolist() == values


def test_not_a_number_stays_and_counts_for_nothing() -> None:
    found = smooth(np.array([1.0, np.nan, 3.0]), 0.5)
    assert math.isnan(found[1])
    assert found[[0, 2]].tolist() == smooth(np.array([1.0, 3.0]), 0.5).tolist()


@pytest.mark.parametrize(
    ("suffix", "x", "label", "smoothing"),
    [
        ("png", "step", "", 0.0),
        ("svg", "step", "step", 0.0),
        ("svg", "samples", "samples", 0.6),
        ("svg", "time", "hours since the first record", 0.6),
    ],
)
def test_pictures(suffix: str, x: str, label: str, smoothing: float, tmp_path: Path) -> None:
    """The same runs give the same."""
    pytest.importorskip("matplotlib")
    runs = open_runs([make_run(tmp_path / "a"), make_run(tmp_path / "$b_1$")])
    file, again = tmp_path / f"p.{suffix}", tmp_path / f"again.{suffix}"
    for output in (file, again):
        plot(runs, ["val/accuracy", "train/loss"], x, smoothing, output)
    assert file.read_bytes() == again.read_bytes()
    if suffix == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        told = "".join(ElementTree.parse(file).getroot().itertext())
        assert all(word in told for word in ("val/accuracy", "train/loss", "a", "$b_1$", label))


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = open_run(make_run(tmp_path / "a", [*training(50), record(60, note=None)]))
    with pytest.raises(UsageError, match=r"no run has val/acuracy .* there are .*val/accuracy"):
        plot([run], ["val/acuracy"], "step", 0.0, tmp_path / "p.png")
    with pytest.raises(UsageError, match=r"must end in .png or .svg"):
        plot([run], ["val/accuracy"], "step", 0.0, tmp_path / "p.gif")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
