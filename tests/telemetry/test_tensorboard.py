"""TensorBoard's event files: everything under its name, also after a disk was full."""

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util.tensor_util import make_ndarray

from launcher.config import defaults, flatten
from launcher.telemetry.append import AppendFile
from launcher.telemetry.media import Media, OnHost, spread
from launcher.telemetry.tensorboard import TensorBoard


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return events


def plugin(events: EventAccumulator, tag: str) -> str:
    return events.SummaryMetadata(tag).plugin_data.plugin_name


def events_in(folder: Path) -> list[Any]:
    """All events, without the purges of a loader; raises for a torn one."""
    (path,) = folder.glob("*tfevents*")
    loaded = RawEventFileLoader(str(path)).Load()
    return [event_pb2.Event.FromString(data) for data in loaded]


def test_pictures_texts_and_histograms(tmp_path: Path) -> None:
    library = pytest.importorskip("PIL.Image")
    sink = TensorBoard(tmp_path, 1)
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    values = torch.linspace(-1, 1, 100)
    sink.show(Media("image", ["val/x"], OnHost(pixels), 5))
    sink.show(Media("text", ["val/note"], "*größer*", 6))
    both = OnHost(torch.stack([spread(values), spread(values * torch.nan)]))
    sink.show(Media("histogram", ["weights/a", "weights/b"], both, 7))
    sink.close()
    events = read(tmp_path)
    assert set(events.Tags()["tensors"]) == {"val/x", "val/note", "weights/a"}
    names = [plugin(events, tag) for tag in ("val/x", "val/note", "weights/a")]
    assert names == ["images", "text", "histograms"]
    (image,), (text,), (histogram,) = map(events.Tensors, ("val/x", "val/note", "weights/a"))
    assert [image.step, text.step, histogram.step] == [5, 6, 7]
    width, height, *files = make_ndarray(image.tensor_proto)
    assert (int(width), int(height)) == (4, 3)
    for file, expected in zip(files, pixels, strict=True):
        assert np.array_equal(np.asarray(library.open(io.BytesIO(file))), expected[0].numpy())
    assert make_ndarray(text.tensor_proto).item().decode() == "*größer*"
    assert make_ndarray(histogram.tensor_proto)[:, 2].sum() == 100


def test_config_and_hparams(tmp_path: Path) -> None:
    """In the run's own file: what a step depends on, the metrics of the first evaluation, and that
    it succeeded."""
    keys = {**flatten(defaults()), "OPTIM.LR": 0.5, "TASK.WIDTH": 3}
    sink = TensorBoard(tmp_path / "run" / "tensorboard", 8, "SEED: 0\n", keys)
    sink.write({"step": 8, "time": 1.0, "train/loss": 1.0})
    sink.write({"step": 8, "time": 1.0, "val/loss": 1.0, "val/accuracy": 0.5})
    sink.write({"step": 9, "time": 1.0, "val/loss": 1.0})
    sink.finish()
    sink.close()
    events = read(tmp_path / "run" / "tensorboard")
    (config,) = events.Tensors("config")
    assert config.step == 7  # a later attempt's purge leaves it alone
    assert make_ndarray(config.tensor_proto).item() == b"```yaml\nSEED: 0\n```"

    def content(tag: str) -> bytes:
        return events.SummaryMetadata(tag).plugin_data.content

    start = hparams.parse_session_start_info_plugin_data(content(hparams.SESSION_START_INFO_TAG))
    assert start.group_name == str(tmp_path / "run")
    assert start.hparams["OPTIM.LR"].number_value == 0.5
    assert start.hparams["OPTIM.NAME"].string_value == "sgd"
    assert start.hparams["OPTIM.NESTEROV"].bool_value is False
    assert start.hparams["OPTIM.BETAS"].string_value == "[0.9, 0.999]"
    assert not any(key.startswith(("LOG.", "OUTPUT_DIR", "EVAL.")) for key in start.hparams)
    experiment = hparams.parse_experiment_plugin_data(content(hparams.EXPERIMENT_TAG))
    assert [m.name.tag for m in experiment.metric_infos] == [
        "val/loss",
        "val/accuracy",
        "train/loss",
    ]
    assert {h.name for h in experiment.hparam_infos} == set(start.hparams)
    assert {h.name for h in experiment.hparam_infos if h.differs} == {"OPTIM.LR", "TASK.WIDTH"}
    end = hparams.parse_session_end_info_plugin_data(content(hparams.SESSION_END_INFO_TAG))
    assert end.status == 1
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1


def test_a_run_without_evaluations_has_its_training_loss(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, 1, "", {"SEED": 0})
    sink.finish()
    sink.close()
    content = read(tmp_path).SummaryMetadata(hparams.EXPERIMENT_TAG).plugin_data.content
    experiment = hparams.parse_experiment_plugin_data(content)
    assert [m.name.tag for m in experiment.metric_infos] == ["train/loss"]


def test_after_a_full_disk_every_number_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on in the same file, whole: torch's writer would stay silent."""
    sink = TensorBoard(tmp_path, 1)
    write = AppendFile._write
    room = [1 << 30]

    def limited(self: AppendFile, file: Any, data: bytes) -> None:
        if len(data) > room[0]:
            write(self, file, data[: room[0]])  # as much as there is room for
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, data)

    monkeypatch.setattr(AppendFile, "_write", limited)
    failed = 0
    for step in range(1, 30):
        room[0] = 33 if 10 <= step < 20 else 1 << 30
        sink.write({"step": step, "time": 1e9 + step, "train/loss": 1 / step})
        try:
            sink.flush()
        except OSError:
            failed += 1
        events_in(tmp_path)  # never torn
    sink.close()
    assert failed == 10
    found = {
        e.step: make_ndarray(e.tensor_proto).item() for e in read(tmp_path).Tensors("train/loss")
    }
    assert found == {step: np.float32(1 / step) for step in range(1, 30)}
    assert [e.step for e in events_in(tmp_path) if e.HasField("summary")] == [*range(1, 30)]


def test_numbers_beyond_single_precision(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, 1)
    sink.write({"step": 1, "time": 1.0, "x": 1e300, "y": float("nan"), "z": 10**30})
    sink.close()
    events = read(tmp_path)
    x, y, z = (make_ndarray(events.Tensors(tag)[0].tensor_proto).item() for tag in "xyz")
    assert x == float("inf") and y != y and z == np.float32(1e30)


def test_nothing_is_written_where_nothing_is_flushed(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "tensorboard", 1, "config", {"SEED": 0})
    assert list(tmp_path.iterdir()) == []
