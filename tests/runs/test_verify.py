"""What verify finds in directories made by hand; tests/system/test_runs.py damages real ones."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.run import open_run
from launcher.runs.verify import MOST, verify
from tests.runs.made import append, event, lines, make_run, record, training

RECORDS = training(100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run in which nothing is wrong."""
    return make_run(tmp_path / "a", RECORDS)


def findings(path: Path) -> list[str]:
    found = [f"{one.where}: {one.what}" for one in verify(open_run(path))]
    return [text for text in found if not text.startswith("checkpoints: none of")]


def rewritten(path: Path, records: list[dict[str, Any]]) -> Path:
    (path / "metrics.jsonl").write_text(lines(records))
    return path


def test_nothing_is_wrong(path: Path) -> None:
    """Also not with nulls, and what the thread that writes tells after the end is no end."""
    nulls = record(100, train__loss=None, train__lr=0.1)
    append(path / "history.jsonl", lines([event("checkpoint", 100), event("sink", 100)]))
    assert findings(rewritten(path, [*RECORDS[:-2], nulls, RECORDS[-1]])) == []


def test_a_line_under_way_is_no_damage(path: Path, tmp_path: Path) -> None:
    live = make_run(tmp_path / "live", training(57), "running", updated=time.time())
    for run in (live, path):
        append(run / "metrics.jsonl", '{"step": 110, "ep')
    assert findings(live) == [] and findings(path) == ["metrics.jsonl:13: a torn last line"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"step": 5, "step": 6}', "no JSON: the key 'step' stands twice"),
        ('{"step": 5, "a": Infinity}', "no JSON: Infinity is no JSON"),
        ("[]", "not an object"),
        ("", "no JSON"),
        (json.dumps({**record(100), "a": "x"}), "a is 'x', no number"),
        (json.dumps({**record(100), "a": True}), "a is True, no number"),
        (json.dumps({**record(100), "a": None}), "null are ['a'], but nonfinite names []"),
        (json.dumps({**record(100), "nonfinite": ["b"]}), "null are [], but nonfinite names ['b']"),
        (json.dumps({**record(100), "samples": 1.5}), "samples is 1.5"),
        (json.dumps({**record(100), "time": None}), "time is None"),
    ],
)
def test_a_line_that_is_no_record(line: str, what: str, path: Path) -> None:
    append(path / "metrics.jsonl", line + "\n")
    found = findings(path)
    assert found[0].startswith("metrics.jsonl:13: ") and what in found[0]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (RECORDS[:3] + RECORDS[2:], "step 30 stands twice for train/loss, train/lr"),
        (RECORDS[:3] + RECORDS[4:], "no train/* record at step 40"),
        (RECORDS[:1] + RECORDS[4:], "no train/* record at step 20 to 40"),
        (RECORDS[:5] + RECORDS[6:], "no val/* record at step 50"),
        ([*RECORDS[:2], RECORDS[3], RECORDS[2], *RECORDS[4:]], "step 30 after step 40"),
    ],
)
def test_repeated_and_missing_records(records: list[Any], told: str, path: Path) -> None:
    assert findings(rewritten(path, records)) == [f"metrics.jsonl: {told}"]


def test_a_gap_is_one_finding_however_wide(path: Path) -> None:
    """A step may be anything in a damaged file."""
    append(path / "metrics.jsonl", lines([record(10**15, train__loss=1.0, train__lr=0.1)]))
    assert f"metrics.jsonl: no train/* record at step 110 to {10**15 - 10}" in findings(path)


def test_a_key_missing_in_one_record(tmp_path: Path) -> None:
    records = training(400)
    del records[7]["train/lr"]
    records[6]["train/rare"] = 1.0
    assert findings(make_run(tmp_path / "a", records)) == ["metrics.jsonl: no train/lr at step 70"]


def test_epochs_are_counted_where_the_period_is_in_epochs(tmp_path: Path) -> None:
    records = [r for r in training(300) if "val/loss" not in r or r["epoch"] % 2 == 0]
    path = make_run(tmp_path / "a", records, config={"EVAL.EVERY": "2ep"})
    assert findings(path) == []
    missing = [r for r in records if "val/loss" not in r or r["epoch"] != 4]
    assert findings(rewritten(path, missing)) == ["metrics.jsonl: no val/* record at epoch 4"]


def test_a_resume_may_change_the_period(tmp_path: Path) -> None:
    """The first attempt recorded every 20 steps, the second every 10."""
    records = [record(s, train__loss=1.0) for s in (*range(20, 101, 20), *range(110, 201, 10))]
    path = make_run(tmp_path / "a", records, config={"EVAL.EVERY": ""})
    events = [("start", 0), ("resume", 140), ("rewind", 100), ("resume", 100), ("finish", 200)]
    (path / "history.jsonl").write_text(lines([event(name, step) for name, step in events]))
    assert findings(path) == []
    told = "metrics.jsonl: no train/* record at step"
    assert findings(rewritten(path, records[:2] + records[3:])) == [f"{told} 60"]
    assert findings(rewritten(path, records[:7] + records[8:])) == [f"{told} 130"]


STATUS = '{{"state": "{}", "step": {}, "epoch": 2}}'
END = "the end of history.jsonl is finish at step 100"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("status.json", STATUS.format("stopped", 100), f"stopped at step 100; {END}"),
        ("status.json", STATUS.format("failed", 100), f"failed at step 100; {END}"),
        ("status.json", STATUS.format("completed", 90), f"completed at step 90; {END}"),
        ("status.json", STATUS.format("odd", 100), ".*cannot be read"),
        ("config.yaml", "a: [", "cannot be read"),
        ("environment.json", '{"a": NaN}', "not strict JSON"),
        ("failure.json", "{", "not strict JSON"),
        ("history.jsonl", "", "does not begin with a start"),
    ],
)
def test_other_files(name: str, content: str, told: str, path: Path) -> None:
    (path / name).write_text(content)
    assert re.match(f"{name}: {told}", findings(path)[0])


@pytest.mark.parametrize("step", [90, 110])
def test_records_that_end_elsewhere(step: int, path: Path) -> None:
    """status.json and history.jsonl agree with each other, not with the records."""
    (path / "status.json").write_text(STATUS.format("completed", step))
    append(path / "history.jsonl", lines([event("finish", step)]))
    assert findings(path) == [f"status.json: says step {step}, the records 100"]


def test_a_long_list_is_cut(path: Path) -> None:
    append(path / "metrics.jsonl", "[]\n" * 100)
    found = findings(path)
    assert len(found) == MOST + 1 and found[-1].endswith("and 80 more")
