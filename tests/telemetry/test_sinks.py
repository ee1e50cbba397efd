"""Sinks: strict JSON a line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.telemetry.media import Media
from launcher.telemetry.sinks import JsonLines, strict

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0, "samples": 8, "time": 1e9, "train/loss": 0.1, "val/größe": 1 / 3},
    {"step": 2, "epoch": 0, "samples": 16, "time": 2e9, "train/loss": 1e-30, "perf/step_s": 3},
    {"step": 9, "epoch": 1, "samples": 72, "time": 3e9 + 0.5, "train/loss": math.pi * 1e20},
]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def parse(line: str) -> dict[str, Any]:
    return json.loads(line, parse_constant=no_constant)


numbers = st.floats() | st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k != "nonfinite"), numbers))
def test_strict(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """Numbers come back to the last bit."""
    path = tmp_path_factory.mktemp("law") / "metrics.jsonl"
    JsonLines(path).write([values])
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    found = parse(path.read_text(encoding="utf-8"))
    assert found.pop("nonfinite", []) == bad
    assert found == {k: None if k in bad else v for k, v in values.items()}


def test_strict_leaves_the_record_itself_alone() -> None:
    record = {"step": 1, "a": math.nan, "b": -math.inf, "c": 1.0}
    assert strict(record) == {"step": 1, "a": None, "b": None, "c": 1.0, "nonfinite": ["a", "b"]}
    assert math.isnan(record["a"]) and "nonfinite" not in record


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    broken = {**RECORDS[0], "train/loss": math.nan, "train/grad_norm": math.inf}
    note = Media("text", ["note"], "none of its business", 1)
    for part in (RECORDS[:2], [RECORDS[2], note, broken]):  # a second attempt appends
        sink = JsonLines(path)
        sink.write(part)
        # On disk then: a killed run has lost nothing.
        assert path.read_text(encoding="utf-8").endswith("}\n")
        sink.write([note])
        sink.close(False)
    lines = path.read_text(encoding="utf-8").splitlines()
    *good, last = map(parse, lines)
    assert good == RECORDS
    assert last["train/loss"] is None and last["nonfinite"] == ["train/loss", "train/grad_norm"]
