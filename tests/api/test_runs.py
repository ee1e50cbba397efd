"""`launcher.open_run`: columns, the rest of a run, and its checkpoints."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launcher
from launcher.errors import RunError, UsageError
from tests.api.line import Line
from tests.api.test_train import CONFIG
from tests.runs.made import append, make_run, record
from tests.system import jobs


def by_hand(file: Path, name: str) -> dict[int, float]:
    """step -> value, NaN for null, read line by line."""
    found = {}
    for one in map(json.loads, file.read_text().splitlines()):
        if name in one:
            found[one["step"]] = np.nan if one[name] is None else one[name]
    return found


def test_columns_are_the_records() -> None:
    records = [
        record(10, train__loss=1.5, train__lr=0.1),
        record(10, val__loss=2.5),
        record(20, train__loss=None, train__lr=0.1),
        record(25, val__loss=2.25),
        record(30, train__loss=0.5, digest=2**53 - 1),
    ]
    path = make_run(Path("run"), records)
    found = launcher.open_run(path).columns()
    assert found["step"].tolist() == [10, 20, 25, 30] and found["step"].dtype == np.int64
    assert found["samples"].tolist() == [640, 1280, 1600, 1920]
    for name in ("train/loss", "train/lr", "val/loss", "digest"):
        expected = by_hand(path / "metrics.jsonl", name)
        values = [expected.get(step, np.nan) for step in found["step"].tolist()]
        np.testing.assert_array_equal(found[name], values)
    assert int(found["digest"][-1]) == 2**53 - 1
    some = launcher.open_run(path).columns("val/loss")
    assert {name: list(values) for name, values in some.items() if name != "time"} == {
        **{"step": [10, 25], "epoch": [0, 0], "samples": [640, 1600]},
        "val/loss": [2.5, 2.25],
    }
    two = launcher.open_run(path).columns("val/loss", "digest")
    assert two["step"].tolist() == [10, 25, 30]
    with pytest.raises(UsageError, match=r"no 'val/lost' so far \(did you mean val/loss\?\)"):
        launcher.open_run(path).columns("val/lost")


def test_a_live_run_is_read_anew() -> None:
    now = time.time()
    path = make_run(Path("run"), [record(10, train__loss=1.0)], "running", updated=now)
    run = launcher.open_run("run")
    assert run.columns()["step"].tolist() == [10]
    append(path / "metrics.jsonl", json.dumps(record(20, train__loss=0.5)) + '\n{"step": 30, "tr')
    assert run.columns("train/loss")["train/loss"].tolist() == [1.0, 0.5]
    assert run.status is not None and run.status.state == "running"
    make_run(Path("other"), [record(10, train__loss=1.0)], "completed")
    (path / "status.json").write_text(Path("other/status.json").read_text())
    assert run.status.state == "completed" and "completed, step 20" in repr(run)


def test_nothing_is_recorded_yet() -> None:
    path = make_run(Path("run"), [], "running")
    (path / "metrics.jsonl").unlink()
    run = launcher.open_run(path)
    assert [len(column) for column in run.columns().values()] == [0, 0, 0, 0]
    assert run.checkpoints == [] and run.failure == {} and run.history[0]["event"] == "start"
    with pytest.raises(UsageError, match="its steps are none"):
        run.checkpoint()


def test_of_another_program_there_are_columns() -> None:
    Path("theirs").mkdir()
    lines = [{"iteration": i, "total_loss": 1.0 / (i + 1), "time": 0.5} for i in (9, 19)]
    Path("theirs/metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = launcher.open_run("theirs")
    assert run.columns("total_loss")["total_loss"].tolist() == [0.1, 0.05]
    assert run.status is None and run.checkpoints == []


def test_no_run() -> None:
    with pytest.raises(UsageError, match="does not exist"):
        launcher.open_run("nowhere")
    with pytest.raises(UsageError, match="NO_SUCH_VARIABLE"):
        launcher.open_run("$NO_SUCH_VARIABLE/run")


def test_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    make_run(Path("run"))
    run = launcher.open_run("run")
    frame, columns = run.frame(), run.columns()
    assert isinstance(frame, pandas.DataFrame) and frame.index.name == "step"
    assert frame.index.tolist() == columns["step"].tolist()
    for name in frame.columns:
        np.testing.assert_array_equal(frame[name].to_numpy(), columns[name])
    assert run.frame("val/loss")["val/loss"].tolist() == [4.0, 2.0]


def test_a_frame_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("run"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        launcher.open_run("run").frame()


def test_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"CHECKPOINT.KEEP_LAST": 2, "CHECKPOINT.MODE": "max", "EVAL.EVERY": "4step"}
    run: Any = launcher.train(CONFIG, Line, overrides=keys)
    steps = [one.step for one in run.checkpoints]
    assert (
        steps == jobs.checkpoint_steps(Path("run")) == [4, 8, 12]
    )  # of the losses the first is greatest
    assert run.checkpoint("best").step == 4 and run.checkpoint("last").step == 12
    middle = run.checkpoint(8)
    assert (middle.epoch, middle.samples) == (8, 8 * 24)
    assert middle.metrics == {"val/loss": by_hand(Path("run/metrics.jsonl"), "val/loss")[8]}
    given: list[Any] = []
    loads = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **how: (given.append(how), loads(*a, **how))[1])
    assert middle.load()["progress"]["step"] == 8 and given[0]["weights_only"] is True
    with pytest.raises(UsageError, match="no checkpoint 9; its steps are 4, 8, 12"):
        run.checkpoint(9)
    jobs.flip_a_bit(middle.path / "state.pt")
    with pytest.raises(RunError, match=r"step_8 cannot be loaded: state\.pt: its sha256 is"):
        middle.load()
    (middle.path / "manifest.json").write_text("{}")
    assert "no readable manifest" in run.checkpoints[1].damaged
    with pytest.raises(UsageError, match="its steps are 4, 12"):
        run.checkpoint(8)
    (middle.path / "manifest.json").unlink()
    (middle.path / "state.pt").unlink()
    middle.path.rmdir()
    with pytest.raises(RunError, match="it is gone"):
        middle.load()
