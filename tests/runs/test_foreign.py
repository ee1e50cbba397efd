"""Other programs' runs, in the formats that their writers document.

detectron2's JSONWriter: an object a line, keys sorted, `iteration` from 0, `time` in seconds, NaN
as Python writes it; a resume appends to the same file. mmengine's LocalVisBackend and LoggerHook:
an object a line with `step`, training ones with `iter` and `epoch`, evaluations of an epoch-based
run with the epoch as their `step`. Lightning's CSVLogger: csv.DictWriter over all keys, a row a
call of log_metrics, empty where it had no such key.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as Proto
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from launcher.errors import UsageError
from launcher.runs import foreign, index
from launcher.runs.run import find, open_run
from tests.runs.made import append, make_run


def detectron2(path: Path) -> Path:
    """20 iterations a record; killed after 80, resumed from a checkpoint at 40."""
    path.mkdir(parents=True)
    with (path / "metrics.json").open("a") as file:
        for attempt, iterations in enumerate(((19, 39, 59, 79), (59, 79, 99))):
            for iteration in iterations:
                one = {"data_time": 0.008, "iteration": iteration, "lr": 0.02, "time": 0.25}
                one["total_loss"] = 100 / (iteration + 1) + attempt
                if iteration == 79:
                    one["bbox/AP"] = 30.0 + attempt
                file.write(json.dumps(one, sort_keys=True) + "\n")
    (path / "config.yaml").write_text("SOLVER:\n  BASE_LR: 0.02\n")
    return path


def mmengine(path: Path) -> Path:
    data = path / "20240102_030405" / "vis_data"
    data.mkdir(parents=True)
    with (data / "scalars.json").open("a") as file:
        for epoch in (1, 2):
            for iteration in (50, 100):
                step = 100 * (epoch - 1) + iteration
                one = {"lr": 0.01, "data_time": 0.01, "loss": 10 / step, "time": 0.1}
                one |= {"epoch": epoch, "iter": step, "memory": 1000, "step": step}
                file.write(json.dumps(one) + "\n")
            file.write(json.dumps({"coco/bbox_mAP": 0.1 * epoch, "step": epoch}) + "\n")
    (data / "20240102_030405.json").write_text((data / "scalars.json").read_text())
    (data / "config.py").write_text("raise SystemExit('a config is not to be run')\n")
    return path


def lightning(path: Path) -> Path:
    folder = path / "version_0"
    folder.mkdir(parents=True)
    rows = [{"lr": 0.1, "train_loss": 1 / (s + 1), "epoch": s // 50, "step": s} for s in (49, 99)]
    rows += [{"val_loss": 0.5, "val_acc": 0.9, "epoch": 1, "step": 99}]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "hparams.yaml").write_text("width: 64\noptimizer:\n  lr: 0.1\n")
    (folder / "checkpoints").mkdir()
    return path


def events(path: Path, name: str, points: list[Event]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with (path / f"events.out.tfevents.{name}").open("wb") as file:
        writer = RecordWriter(file)
        for event in [Event(wall_time=1.0, file_version="brain.Event:2"), *points]:
            writer.write(event.SerializeToString())
    return path


def scalar(tag: str, step: int, value: float, new_style: bool = False) -> Event:
    one = Proto.Value(tag=tag, simple_value=value)
    if new_style:  # as TensorFlow 2 and torch's new_style=True
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(plugin_data=plugin)
        tensor = make_tensor_proto(value, dtype="float32")
        one = Proto.Value(tag=tag, tensor=tensor, metadata=metadata)
    return Event(wall_time=1000.0 + step, step=step, summary=Proto(value=[one]))


def text(tag: str) -> Event:
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    tensor = make_tensor_proto([b"# a config"])
    metadata = SummaryMetadata(plugin_data=plugin)
    value = Proto.Value(tag=tag, tensor=tensor, metadata=metadata)
    return Event(wall_time=1.0, step=0, summary=Proto(value=[value]))


def tensorboard(path: Path) -> Path:
    points = [text("config"), *(scalar("loss", s, 1 / s) for s in (10, 20, 30))]
    points += [scalar("acc", 20, 0.5, new_style=True)]
    return events(path, "1700000000.host.1.0", points)


MAKERS = {"d": detectron2, "m": mmengine, "l": lightning, "t": tensorboard}
Make = Callable[[Path], Path]
every = pytest.mark.parametrize("make", MAKERS.values())
of_lines = pytest.mark.parametrize("make", [detectron2, mmengine, lightning])


def points(path: Path, key: str, x: str = "step") -> list[tuple[float, float]]:
    at, values = open_run(path).table().in_order().series(key, x)
    return list(zip(at.tolist(), values.tolist(), strict=True))


def test_detectron2(tmp_path: Path) -> None:
    path = detectron2(tmp_path / "old")
    run = open_run(path)
    assert (run.kind, run.state, run.records.name) == ("detectron2", "?", "metrics.json")
    # Of the steps that the resume did once more, the later ones count.
    loss = [(19, 5.0), (39, 2.5), (59, 100 / 60 + 1), (79, 2.25), (99, 2.0)]
    assert points(path, "total_loss") == loss
    assert points(path, "bbox/AP") == [(79, 31.0)]
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
    path.write_text(
        '{"loss": 1.0, "epoch": 1, "iter": 100, "step": 100}\n{"acc": 0.5, "step": 100}\n'
    )
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
    assert run.kind == "tensorboard" and set(run.summary.series) == {"loss", "acc"}
    assert points(path, "loss")[0] == (10, pytest.approx(0.1))
    assert points(path, "acc") == [(20, 0.5)]
    assert points(path, "acc", "time") == [(1020.0, 0.5)]


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    """A file that says where it goes on supersedes what came from there; else the later counts."""
    path = tensorboard(tmp_path / "old")
    start = Event(wall_time=5.0, step=15, session_log=SessionLog(status=SessionLog.START))
    events(path, "1700000001.host.2.0", [start, scalar("loss", 25, 9.0)])
    assert [step for step, _ in points(path, "loss")] == [10, 25]
    events(path, "1700000002.host.3.0", [scalar("loss", 25, 8.0)])
    assert points(path, "loss")[1] == (25, 8.0)


@every
def test_the_index_follows(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading comes from the index, and a change of the file is seen."""
    path = make(tmp_path / "old")
    key = sorted(open_run(path).summary.series)[0]
    before = open_run(path).summary.series[key].count
    with monkeypatch.context() as patch:
        patch.setattr(index, "read", None)
        assert open_run(path).summary.series[key].count == before
    run = open_run(path)
    if run.kind == "tensorboard":
        events(run.path, "1800000000.host.9.0", [scalar(key, 500, 1.0)])
    elif run.kind == "lightning":
        text = run.records.read_text().splitlines(keepends=True)
        run.records.write_text("".join([*text, text[-1].replace("99", "500")]), newline="")
        key = "val_loss"
        before = 1
    else:
        append(run.records, json.dumps({"iteration": 500, "step": 500, key: 1.0}) + "\n")
    assert open_run(path).summary.series[key].count == before + 1


@of_lines
def test_torn_and_damaged_lines_are_told(make: Make, tmp_path: Path) -> None:
    path = make(tmp_path / "old")
    records, whole = open_run(path).records, open_run(path).summary.records
    data = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join([*data[:3], b"\0\0\0\n", *data[3:], data[-1][:9]]))
    run = open_run(path)
    assert run.summary.records == whole and len(run.summary.damaged) == 2
    assert all(str(records) in line for line in run.damaged)


def test_not_a_number_as_python_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 19, "total_loss": NaN}\n{"iteration": 39, "total_loss": 1.0}\n')
    (_, first), last = points(path, "total_loss")
    assert math.isnan(first) and last == (39, 1.0)


def test_all_of_them_below_one_root(tmp_path: Path) -> None:
    for name, make in MAKERS.items():
        make(tmp_path / name)
    make_run(tmp_path / "ours")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.json").write_text('{"images": []}\n')
    (tmp_path / "data" / "steps.csv").write_text("run,step,a\nx,1,2\n")  # an export of ours
    found = {run.name: run.kind for run in find(tmp_path)}
    assert found == {
        "d": "detectron2",
        "m/20240102_030405/vis_data": "mmengine",
        "l/version_0": "lightning",
        "t": "tensorboard",
        "ours": "launcher",
    }


@of_lines
def test_their_names_do_not_matter(make: Make, tmp_path: Path) -> None:
    run = open_run(make(tmp_path / "old"))
    count = run.summary.records
    for name in ("log", *(["scalars"] if make is detectron2 else [])):
        records = open_run(run.path).records
        records.rename(records.with_stem(name))
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


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    with pytest.raises(UsageError, match=r"holds no run; below it are .*a, .*b"):
        open_run(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        open_run(tmp_path / "absent")
    assert foreign.recognise(tmp_path) is None
