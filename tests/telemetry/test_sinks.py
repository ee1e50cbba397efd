"""Sinks: strict JSON a line, the same numbers in TensorBoard, a line for people."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from launcher.telemetry.console import Console
from launcher.telemetry.sinks import ConsoleLines, JsonLines, strict, summary
from launcher.telemetry.tensorboard import TensorBoard

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0, "samples": 8, "time": 1e9, "train/loss": 0.1, "val/größe": 1 / 3},
    {"step": 2, "epoch": 0, "samples": 16, "time": 2e9, "train/loss": 1e-30, "perf/step_s": 3},
    {"step": 9, "epoch": 1, "samples": 72, "time": 3e9 + 0.5, "train/loss": math.pi * 1e20},
]
POSITION = {"step", "epoch", "samples", "time"}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def parse(line: str) -> dict[str, Any]:
    return json.loads(line, parse_constant=no_constant)


numbers = st.floats() | st.integers(-(10**12), 10**12)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k != "nonfinite"), numbers))
def test_strict(values: dict[str, Any]) -> None:
    record = json.dumps(strict(values), allow_nan=False)  # raises for what is not JSON
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    found = parse(record)
    assert found.pop("nonfinite", []) == bad
    assert found == {k: None if k in bad else v for k, v in values.items()}


def test_strict_leaves_the_record_itself_alone() -> None:
    record = {"step": 1, "a": math.nan, "b": -math.inf, "c": 1.0}
    assert strict(record) == {"step": 1, "a": None, "b": None, "c": 1.0, "nonfinite": ["a", "b"]}
    assert math.isnan(record["a"]) and "nonfinite" not in record


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    broken = {**RECORDS[0], "train/loss": math.nan, "train/grad_norm": math.inf}
    for part in (RECORDS[:2], [RECORDS[2], broken]):  # a second attempt appends
        sink = JsonLines(path)
        for record in part:
            sink.write(record)
            sink.flush()
            # On disk then: a killed run has lost nothing.
            assert path.read_text(encoding="utf-8").endswith("}\n")
        sink.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    *good, last = map(parse, lines)
    assert good == RECORDS
    assert last["train/loss"] is None and last["nonfinite"] == ["train/loss", "train/grad_norm"]


def test_tensorboard_holds_the_same_numbers_under_the_same_names(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, purge_step=1)
    for record in RECORDS:
        sink.write(record)
    sink.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = {
        (tag, event.step, event.wall_time): make_ndarray(event.tensor_proto)
        for tag in read.Tags()["tensors"]
        for event in read.Tensors(tag)
    }
    # In single precision, the only one that TensorBoard's fast loader shows.
    expected = {
        (key, record["step"], record["time"]): np.float32(value)
        for record in RECORDS
        for key, value in record.items()
        if key not in POSITION
    }
    assert found == expected
    assert all(value.dtype == np.float32 for value in found.values())


def test_what_a_resumed_run_does_again_stands_once(tmp_path: Path) -> None:
    """A crash after step 3, a resume from step 1: TensorBoard drops the old steps 2 and 3."""
    for resumed_at, steps in ((0, (1, 2, 3)), (1, (2,))):
        sink = TensorBoard(tmp_path, purge_step=resumed_at + 1)
        for step in steps:
            sink.write({"step": step, "time": 1e9 + step, "x": float(step)})
        sink.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Tensors("x")] == [1, 2]


def test_summary_leaves_system_figures_out() -> None:
    record = {**RECORDS[0], "val/accuracy": 0.98765, "system/rss_gib": 1.0}
    assert summary(record) == "step 1  epoch 0  loss 0.1  val/größe 0.3333  val/accuracy 0.9877"


def test_console_line_a_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "launcher")
    sink = ConsoleLines(Console(10, enabled=True))
    sink.write(RECORDS[0])
    sink.close()
    assert caplog.messages == [summary(RECORDS[0])]
