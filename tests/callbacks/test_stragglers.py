"""Whose part of a step is long."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from launcher.callbacks.stragglers import NAMED, Stragglers
from tests.callbacks.helpers import view


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_own_time_ends_with_the_last_backward_pass(micro_batches: int) -> None:
    own = Stragglers(view())
    for _ in range(2):
        own.before_step(1)
        for _ in range(micro_batches):
            time.sleep(0.01)
            loss = (torch.ones(3, requires_grad=True) * 2).sum()
            own.on_backward(loss)
            loss.backward()
        time.sleep(0.2)  # as the waiting for other ranks: not in it
        own.on_gradients()
    assert 0.01 * micro_batches <= own.local_figures()["own_s"] < 0.2
    assert own.local_figures() == {"own_s": 0.0}


def told(*seconds: float) -> list[dict[str, float]]:
    return [{"own_s": own} for own in seconds]


def test_figures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stragglers = Stragglers(view())
    figures = stragglers.figures({}, told(0.1, 0.12, 0.3, 0.11))
    assert figures == {"perf/slowest_rank": 2, "perf/rank_spread_s": pytest.approx(0.2)}
    assert "slowest first: 2: 0.3, 1: 0.12, 3: 0.11, 0: 0.1" in caplog.text
    stragglers.figures({}, told(0.1, 0.12, 0.3, 0.11))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "rank 2 holds the others up" in warnings[0]


def test_many_ranks_take_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Stragglers(view()).figures({}, told(*[0.1] * 500))
    line = next(r.getMessage() for r in caplog.records if "own seconds" in r.getMessage())
    assert line.count(":") == NAMED + 1 and line.endswith(f"and {500 - NAMED} faster ones")
    assert not any(r.levelno == logging.WARNING for r in caplog.records)
