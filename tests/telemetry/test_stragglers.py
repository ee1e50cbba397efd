"""Whose part of a step is long."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from launcher.telemetry.stragglers import NAMED, OwnTime, Stragglers


def test_own_time_ends_with_the_backward_pass() -> None:
    own = OwnTime(torch.device("cpu"))
    for _ in range(2):
        own.begin()
        time.sleep(0.01)
        weight = torch.ones(3, requires_grad=True)
        loss = (weight * 2).sum()
        own.watch(loss)
        loss.backward()
        assert own.steps > 0  # taken in the pass itself
        time.sleep(0.2)  # as the waiting for other ranks: not in it
    seconds = own.take()
    assert 0.01 <= seconds < 0.2
    assert own.take() == 0.0


def test_figures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stragglers = Stragglers()
    figures = stragglers.figures([0.1, 0.12, 0.3, 0.11])
    assert figures == {"perf/slowest_rank": 2, "perf/rank_spread_s": pytest.approx(0.2)}
    assert "slowest first: 2: 0.3, 1: 0.12, 3: 0.11, 0: 0.1" in caplog.text
    stragglers.figures([0.1, 0.12, 0.3, 0.11])
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "rank 2 holds the others up" in warnings[0]


def test_many_ranks_take_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Stragglers().figures([0.1] * 500)
    line = next(r.getMessage() for r in caplog.records if "own seconds" in r.getMessage())
    assert line.count(":") == NAMED + 1 and line.endswith(f"and {500 - NAMED} faster ones")
    assert not any(r.levelno == logging.WARNING for r in caplog.records)
