"""What a run is: its state, how far it is, its best, its duration; and many of them at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest import mock

import pytest

from launcher.runs import run as module
from launcher.runs.run import find, load_summaries, open_run, open_runs
from tests.runs.made import START, append, event, lines, make_run, record, training


@pytest.mark.parametrize(
    ("duration", "written", "state", "total"),
    [
        ("500step", None, "running", 500),
        ("20ep", None, "running", None),
        ("20ep", 460, "running", 460),
        ("500step", 460, "running", 460),
        ("20ep", None, "completed", 100),
        ("1h", None, "failed", None),
        ("what", None, "running", None),
    ],
)
def test_total_steps(
    duration: str, written: int | None, state: str, total: int | None, tmp_path: Path
) -> None:
    """By environment.json, else by a duration in steps, else where a completed run ended."""
    path = make_run(tmp_path / "a", state=state, config={"TRAIN.DURATION": duration})
    (path / "environment.json").write_text(json.dumps({"total_steps": written}))
    assert open_run(path).total_steps == total


def test_the_duration_leaves_pauses_out(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", updated=START + 10_031)
    told = (("start", 0), ("checkpoint", 60), ("resume", 10_000), ("finish", 10_030))
    history = lines([event(name, 0, after) for name, after in told])
    (path / "history.jsonl").write_text(history)
    assert open_run(path).duration == 60 + 31


@pytest.mark.parametrize(
    "name", ["config.yaml", "status.json", "environment.json", "history.jsonl"]
)
@pytest.mark.parametrize("content", [None, b"", b"\0\0", b"[1", b'{"a": ', b"- x\n", b"\xff\xfe"])
def test_any_file_may_be_missing_or_damaged(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "a")
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    run = open_run(path)
    assert run.summary.records == 12 and run.step == 100 and run.everything()


def test_the_records_may_be_missing_or_unreadable(tmp_path: Path) -> None:
    file = make_run(tmp_path / "a") / "metrics.jsonl"
    file.unlink()
    run = open_run(file.parent)
    assert (run.state, run.step, run.summary.records) == ("completed", 100, 0)
    assert run.best(run.metric) is None and run.damaged == []
    file.mkdir()
    assert open_run(file.parent).damaged == [f"{file}:0: cannot be read: Is a directory"]


def test_a_live_run_is_read_as_it_is(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", training(50), "running", updated=time.time(), step=57)
    append(path / "metrics.jsonl", '{"step": 60, "ep')
    run = open_run(path)
    assert (run.state, run.step, run.summary.records) == ("running", 57, 6)
    assert run.damaged == [f"{path}/metrics.jsonl:7: a torn last line"]


def test_names_are_as_long_as_they_need_to_be(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("x/run", "y/run", "other")]
    assert [run.name for run in open_runs(paths)] == ["x/run", "y/run", "other"]


def test_finding_does_not_look_inside_runs(tmp_path: Path) -> None:
    for name in ("a/run", "a/run/inner", "b", ".hidden"):
        make_run(tmp_path / name)
    assert sorted(run.name for run in find(tmp_path)) == ["a/run", "b"]
    assert [run.name for run in find(tmp_path / "b")] == ["b"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Also to another folder of runs, but not in a circle, and no run is found twice."""
    elsewhere = make_run(tmp_path / "disk" / "far").parent
    root = make_run(tmp_path / "runs" / "z").parent
    links = {"latest": root / "z", "circle": root, "more": elsewhere}
    links |= {"gone": tmp_path / "absent", "itself": root / "itself"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    assert [run.name for run in find(root)] == ["z", "more/far"]


@pytest.mark.parametrize("parallel", [1, module.PARALLEL])
def test_summaries_of_many(parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, or here: the same, and without curves in memory."""
    monkeypatch.setattr(module, "PARALLEL", parallel)
    for number in range(4):
        make_run(tmp_path / f"run-{number}", training(50 * (number + 1)))
    make_run(tmp_path / "empty", [])
    pool = mock.Mock(wraps=module.ProcessPoolExecutor)
    monkeypatch.setattr(module, "ProcessPoolExecutor", pool)
    for _ in range(2):
        runs = sorted(find(tmp_path), key=lambda run: run.name)
        load_summaries(runs, workers=2)
        assert [run.summary.records for run in runs] == [0, 6, 12, 18, 24]
        assert all(len(s.curve) == 0 for run in runs for s in run.summary.series.values())
        assert [call.args[0] for call in pool.call_args_list] == ([2] if parallel == 1 else [])
    assert open_run(tmp_path / "run-3").summary.series["train/loss"].curve.shape == (20, 3)


def test_nothing_is_written_into_a_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    files = [path, *path.iterdir()]
    before = [file.stat().st_mtime_ns for file in files]
    path.chmod(0o555)
    run = open_run(path)
    load_summaries([run], 1)
    assert run.table() and run.best(run.metric)
    path.chmod(0o755)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_which_way_is_better(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "a", [record(1, x=1.0)], config={"CHECKPOINT.METRIC": "x"}))
    ways = {"x": "max", "val/loss": "min", "val/top1_acc": "max", "perf/step_s": "min", "norm": ""}
    assert {key: run.mode(key) for key in ways} == ways
