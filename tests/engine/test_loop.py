"""What the loop warns of: waiting for data, and a disk too small for the checkpoints."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from launcher.config import defaults
from launcher.engine.loop import Loop, StopWatch
from launcher.errors import RunError
from tests.engine.helpers import ALONE, unwatched


def bare(**parts: object) -> Loop:
    """A loop with nothing but the parts that a warning reads."""
    loop = object.__new__(Loop)
    loop.__dict__.update(parts)
    return loop


@pytest.mark.parametrize(("waited", "warned"), [(0.3, False), (0.5, True)])
def test_a_run_that_waits_for_data_is_told_once(
    waited: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue 3, item 9: more than a fifth of the time, with the numbers, one line."""
    caplog.set_level(logging.WARNING, "launcher")
    clock = StopWatch(started=0.0, data=waited, steps=4)
    loop = bare(clock=clock, advised=False, data=SimpleNamespace(size=SimpleNamespace(reason="R")))
    loop._advise(2.0)
    loop._advise(2.0)
    lines = [record.message for record in caplog.records]
    assert len(lines) == int(warned)
    if warned:
        assert "25 %" in lines[0] and "0.1250 of perf/step_s 0.5000; R" in lines[0]


@pytest.mark.parametrize(("room", "warned"), [(3, True), (5, False)])
def test_a_disk_too_small_for_the_checkpoints_is_told(
    room: int,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 4, item 3: KEEP_LAST 2, KEEP_BEST 1 and the one being written are four."""
    caplog.set_level(logging.WARNING, "launcher")
    model = nn.Linear(10, 10)
    one = 2 * 4 * 110  # weights and momentum, four bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room * one))
    loop = bare(
        cfg=defaults(),
        saver=object(),
        state=SimpleNamespace(model=model, ema=None),
        directory=SimpleNamespace(path=tmp_path),
    )
    loop._check_space()
    assert bool(caplog.records) == warned


def test_a_run_is_not_complete_without_its_last_checkpoint() -> None:
    """Issue 4, item 3: where the records before it cannot be written, the run says so and fails."""
    state = SimpleNamespace(
        capture=lambda runtime: {}, recorder=SimpleNamespace(flush=lambda: False)
    )
    loop = bare(state=state, runtime=ALONE, saver=object(), guard=unwatched())
    loop.save()  # a save under way is only skipped
    with pytest.raises(RunError, match="no last checkpoint"):
        loop.save(last=True)
