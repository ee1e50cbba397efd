"""A gradient norm far beyond its recent spread is told of, and an ordinary one is not."""

from __future__ import annotations

import logging
import random

import pytest

from launcher.callbacks.spikes import Spikes
from tests.callbacks.helpers import view


def told(norms: list[float], caplog: pytest.LogCaptureFixture) -> list[int]:
    watch = Spikes(view())
    with caplog.at_level(logging.WARNING):
        for step, norm in enumerate(norms, 1):
            watch.on_record({"step": step, "train/grad_norm": norm})
        watch.on_record(None)  # another rank's
    return [int(words[words.index("step") + 1].strip(";")) for words in _lines(caplog)]


def _lines(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    return [record.getMessage().split() for record in caplog.records]


@pytest.mark.parametrize(
    ("norms", "steps"),
    [
        ([1.0] * 20 + [100.0] + [1.0] * 5, [21]),
        ([1.0] * 5 + [100.0], []),  # nothing is known yet
        ([1.0] * 20 + [3.9], []),  # beyond a spread of nothing, but no multiple
        ([float("nan")] * 20 + [1.0] * 20 + [float("inf"), 9.0], [42]),  # told of elsewhere
        ([10.0 / step for step in range(1, 60)], []),  # falling, as norms do
    ],
)
def test_what_is_far_beyond(
    norms: list[float], steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert told(norms, caplog) == steps


def test_noise_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(3)
    assert told([draw.lognormvariate(0, 0.5) for _ in range(2000)], caplog) == []


def test_each_phase_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    watch = Spikes(view())
    for step in range(30):
        watch.on_record({"step": step, "train/grad_norm/a": 1.0, "train/grad_norm/b": 900.0})
    assert not caplog.records
    watch.on_record({"step": 30, "train/grad_norm/a": 900.0, "train/grad_norm/b": 900.0})
    assert "train/grad_norm/a is 900" in caplog.text and "grad_norm/b" not in caplog.text
