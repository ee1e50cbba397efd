"""A line a record for people."""

import logging
from typing import Any

import pytest

from launcher.callbacks.log_lines import LogLines, summary
from launcher.telemetry.media import Media
from tests.callbacks.helpers import view

RECORD: dict[str, Any] = {"step": 1, "epoch": 0, "samples": 8, "time": 1e9, "train/loss": 0.1}


def test_summary_leaves_system_figures_out() -> None:
    record = {**RECORD, "val/größe": 1 / 3, "val/accuracy": 0.98765, "system/rss_gib": 1.0}
    assert summary(record) == "step 1  epoch 0  loss 0.1  val/größe 0.3333  val/accuracy 0.9877"


@pytest.mark.parametrize(
    ("seconds", "read"), [(0, "0:00:00"), (60.6, "0:01:01"), (90061, "1 day, 1:01:01")]
)
def test_eta_is_read_as_a_time(seconds: float, read: str) -> None:
    record = {"step": 1, "epoch": 0, "perf/eta_s": seconds}
    assert summary(record) == f"step 1  epoch 0  eta {read}"


def test_console_line_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """A progress bar can tell those of the training, which it stands for, from others."""
    caplog.set_level(logging.INFO, "launcher")
    evaluated = {"step": 1, "epoch": 0, "val/loss": 2.0}
    LogLines(view()).sink().write([RECORD, Media("text", ["note"], "x", 1), evaluated])
    assert caplog.messages == [summary(RECORD), summary(evaluated)]
    assert [vars(record)["training"] for record in caplog.records] == [True, False]
