"""Other programs' runs, in the formats that their writers document.

detectron2's JSONWriter: an object a line, keys sorted, `iteration` from 0, `time` in seconds, NaN
as Python writes it; a resume appends to the same file. mmengine's LocalVisBackend and LoggerHook:
an object a line with `step`, training ones with `iter` and `epoch`, evaluations of an epoch-based
run with the epoch as their `step`. Lightning's CSVLogger: csv.DictWriter over all keys, a row a
call of log_metrics, empty where it had no such key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from launcher.errors import UsageError
from launcher.runs import foreign, index
from launcher.runs.run import find, open_run
from launcher.runs.tail import tail
from launcher.runs.verify import verify
from tests.runs.made import append, lines, make_run


def detectron2(path: Path) -> Path:
    """20 iterations a record; killed after 80, resumed from a checkpoint at 40."""
    path.mkdir()
    usual = {"data_time": 0.008, "lr": 0.02, "time": 0.25}
    iterations = (19, 39, 59, 79, 59, 79, 99)
    losses = (5.0, 2.5, 1.5, 1.25, 2.5, 2.25, 2.0)
    told = zip(iterations, losses, strict=True)
    records = [usual | {"iteration": at, "total_loss": loss} for at, loss in told]
    records[0]["grad_norm"] = math.nan
    records[3]["bbox/AP"], records[5]["bbox/AP"] = 30.0, 31.0
    (path / "metrics.json").write_text(lines(records))
    (path / "config.yaml").write_text("SOLVER:\n  BASE_LR: 0.02\n")
    return path


def mmengine(path: Path) -> Path:
    data = path / "20240102_030405" / "vis_data"
    data.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for epoch in (1, 2):
        for step in (100 * epoch - 50, 100 * epoch):
            usual = {"lr": 0.01, "data_time": 0.01, "loss": 10 / step, "time": 0.1}
            records.append(usual | {"epoch": epoch, "iter": step, "memory": 1000, "step": step})
        records.append({"coco/bbox_mAP": 0.1 * epoch, "step": epoch})
    for name in ("scalars.json", "20240102_030405.json"):
        (data / name).write_text(lines(records))
    (data / "config.py").write_text("raise SystemExit('a config is not to be run')\n")
    return path


def lightning(path: Path) -> Path:
    folder = path / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    rows = ("lr,train_loss,epoch,step,val_loss,val_acc", "0.1,0.02,0,49,,", "0.1,0.01,1,99,,")
    text = "".join(f"{row}\r\n" for row in (*rows, ",,1,99,0.5,0.9"))
    (folder / "metrics.csv").write_text(text, newline="")
    (folder / "hparams.yaml").write_text("width: 64\noptimizer:\n  lr: 0.1\n")
    return path


def events(path: Path, name: str, *told: Event) -> Path:
    path.mkdir(exist_ok=True)
    with (path / f"events.out.tfevents.{name}").open("wb") as file:
        writer = RecordWriter(file)
        for event in (Event(wall_time=1.0, file_version="brain.Event:2"), *told):
            writer.write(event.SerializeToString())
    return path


def event(tag: str, step: int, **value: Any) -> Event:
    summary = {"value": [{"tag": tag, **value}]}
    return Event(wall_time=1000.0 + step, step=step, summary=summary)


def tensor(plugin: str, value: Any, dtype: str | None = None) -> dict[str, Any]:
    """As TensorFlow 2 writes it, and torch with new_style=True."""
    metadata = {"plugin_data": {"plugin_name": plugin}}
    return {"tensor": make_tensor_proto(value, dtype=dtype), "metadata": metadata}


def tensorboard(path: Path) -> Path:
    told = [event("config", 0, **tensor("text", [b"# a config"]))]
    told += [event("loss", step, simple_value=1 / step) for step in (10, 20, 30)]
    told += [event("lr", 20, **tensor("scalars", 0.5, dtype="float32"))]
    return events(path, "1700000000.host.1.0", *told)


MAKERS = {"d": detectron2, "m": mmengine, "l": lightning, "t": tensorboard}
Make = Callable[[Path], Path]
of_lines = pytest.mark.parametrize("make", [detectron2, mmengine, lightning])


def points(path: Path, key: str, x: str = "step") -> list[tuple[float, float]]:
    at, values = open_run(path).table().in_order().series(key, x)
    return list(zip(at.tolist(), values.tolist(), strict=True))


def test_detectron2(tmp_path: Path) -> None:
    path = detectron2(tmp_path / "old")
    run = open_run(path)
    assert (run.kind, run.state, run.records.name) == ("detectron2", "?", "metrics.json")
    # Of the steps that the resume did once more, the later ones count.
    assert points(path, "total_loss") == [(19, 5.0), (39, 2.5), (59, 2.5), (79, 2.25), (99, 2.0)]
    assert points(path, "bbox/AP") == [(79, 31.0)]
    assert math.isnan(points(path, "grad_norm")[0][1])
    assert points(path, "perf/step_s")[0] == (19, 0.25)  # their `time` is no moment
    assert run.summary.last["time"] is None
    assert run.config == {"SOLVER.BASE_LR": 0.02}
    assert (run.metric, run.mode("total_loss"), run.mode("bbox/AP")) == ("total_loss", "min", "max")
    assert run.best("total_loss") == (99, 2.0) and run.best("bbox/AP") == (79, 31.0)


def test_mmengine(tmp_path: Path) -> None:
    """Found where it lies, two folders down; its evaluations get the step of the training."""
    path = mmengine(tmp_path / "old")
    run = open_run(path)
    assert (run.kind, run.records.name) == ("mmengine", "scalars.json")
    assert points(path, "loss") == [(50, 0.2), (100, 0.1), (150, 10 / 150), (200, 0.05)]
    assert points(path, "coco/bbox_mAP") == [(100, 0.1), (200, 0.2)]
    assert points(path, "loss", "epoch")[-1] == (2, 0.05)
    assert run.config == {} and run.summary.damaged == []


def test_mmengine_by_iterations(tmp_path: Path) -> None:
    """There an evaluation's step is a step."""
    path = tmp_path / "scalars.json"
    records = [{"loss": 1.0, "epoch": 1, "iter": 100, "step": 100}, {"acc": 0.5, "step": 100}]
    path.write_text(lines(records))
    assert points(path, "acc") == [(100, 0.5)]


def test_lightning(tmp_path: Path) -> None:
    path = lightning(tmp_path / "lightning_logs")
    run = open_run(path)
    assert (run.kind, run.path) == ("lightning", path / "version_0")
    assert points(path, "train_loss") == [(49, 0.02), (99, 0.01)]
    assert points(path, "val_acc") == [(99, 0.9)] and points(path, "val_acc", "epoch") == [(1, 0.9)]
    assert run.config == {"width": 64, "optimizer.lr": 0.1}
    assert (run.metric, run.best("val_loss")) == ("val_loss", (99, 0.5))


def test_tensorboard(tmp_path: Path) -> None:
    path = tensorboard(tmp_path / "old")
    run = open_run(path)
    assert run.kind == "tensorboard" and set(run.summary.series) == {"loss", "lr"}
    assert points(path, "loss")[0] == (10, pytest.approx(0.1))
    assert points(path, "lr") == [(20, 0.5)] and points(path, "lr", "time") == [(1020.0, 0.5)]


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    """A file that says where it goes on supersedes what came from there; else the later counts."""
    path = tensorboard(tmp_path / "old")
    start = Event(wall_time=5.0, step=15, session_log=SessionLog(status=SessionLog.START))
    events(path, "1700000001.host.2.0", start, event("loss", 25, simple_value=9.0))
    assert [step for step, _ in points(path, "loss")] == [10, 25]
    events(path, "1700000002.host.3.0", event("loss", 25, simple_value=8.0))
    assert points(path, "loss")[1] == (25, 8.0)


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (detectron2, '{"iteration": 500, "lr": 0.02}\n'),
        (mmengine, '{"step": 500, "lr": 0.01}\n'),
        (lightning, "0.1,,9,500,,\r\n"),
        (tensorboard, ""),
    ],
)
def test_the_index_follows(
    make: Make, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reading comes from the index, and a change of the file is seen."""
    run = open_run(make(tmp_path / "old"))
    before = run.summary.series["lr"].count
    with monkeypatch.context() as patch:
        patch.setattr(index, "read", None)
        assert open_run(run.path).summary.series["lr"].count == before
    if more:
        append(run.records, more)
    else:
        events(run.path, "1800000000.host.9.0", event("lr", 500, simple_value=1.0))
    assert open_run(run.path).summary.series["lr"].count == before + 1


@of_lines
def test_torn_and_damaged_lines_are_told(make: Make, tmp_path: Path) -> None:
    path = make(tmp_path / "old")
    records, whole = open_run(path).records, open_run(path).summary.records
    data = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join([*data[:3], b"\0\0\0\n", *data[3:], data[-1][:9]]))
    run = open_run(path)
    assert run.summary.records == whole and len(run.summary.damaged) == 2
    assert all(str(records) in line for line in run.damaged)


def test_all_of_them_below_one_root(tmp_path: Path) -> None:
    """Each is found; none of them is the root's own."""
    for name, make in MAKERS.items():
        make(tmp_path / name)
    make_run(tmp_path / "ours")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.json").write_text('{"images": []}\n')
    (tmp_path / "data" / "steps.csv").write_text("run,step,a\nx,1,2\n")  # an export of ours
    assert {run.name: run.kind for run in find(tmp_path)} == {
        "d": "detectron2",
        "m/20240102_030405/vis_data": "mmengine",
        "l/version_0": "lightning",
        "t": "tensorboard",
        "ours": "launcher",
    }
    assert foreign.recognise(tmp_path) is None
    with pytest.raises(UsageError, match=r"holds no run; below it are .*/d, .*/l/version_0, "):
        open_run(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        open_run(tmp_path / "absent")


@of_lines
def test_their_names_do_not_matter(make: Make, tmp_path: Path) -> None:
    run = open_run(make(tmp_path / "old"))
    count, file = run.summary.records, run.records
    for name in ("log", "scalars") if make is detectron2 else ("log",):
        file = file.rename(file.with_stem(name))
        found = open_run(run.path)
        assert (found.kind, found.summary.records) == (run.kind, count)


def test_a_folder_of_many_files_is_not_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (tmp_path / f"label-{number}.json").write_text('{"boxes": []}\n')
    asked: list[Path] = []
    monkeypatch.setattr(foreign, "_kind", asked.append)
    assert foreign.recognise(tmp_path) is None and len(asked) == foreign.TRIED


def test_what_is_promised_of_our_runs_only(tmp_path: Path) -> None:
    run = open_run(detectron2(tmp_path / "old"))
    with pytest.raises(UsageError, match="detectron2's"):
        verify(run)
    with pytest.raises(UsageError, match="detectron2's"):
        list(tail(run, 1, True))
