"""TensorBoard's event files: everything under its name, also after a disk was full."""

import errno
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util.tensor_util import make_ndarray

from launcher.callbacks.tensorboard import EventFile
from launcher.config import load_config
from launcher.tasks.pictures import spread
from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.sinks import AppendFile, Record

CFG = load_config(None, ["OPTIM.LR", "0.5"], require_task=False).cfg


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    return events


def events_in(folder: Path) -> list[Any]:
    """All events, without the purges of a loader; raises for a torn one."""
    (path,) = folder.glob("*tfevents*")
    loaded = RawEventFileLoader(str(path)).Load()
    return [event_pb2.Event.FromString(data) for data in loaded]


def write(
    folder: Path, *items: Record | Media, purge_step: int = 1, completed: bool = False
) -> Any:
    """What the event files hold after a sink with these items."""
    sink = EventFile(folder, purge_step, CFG)
    for item in items:
        sink.write([item])
    sink.close(completed)
    return read(folder)


def record(step: int, **values: float) -> Record:
    return {"step": step, "epoch": 7, "samples": 8, "time": 1e9 + step, **values}


def test_numbers_are_scalars_in_single_precision(tmp_path: Path) -> None:
    values = {"train/loss": 0.1, "val/größe": 1 / 3, "inf": 1e300, "nan": math.nan, "int": 10**30}
    events = write(tmp_path, record(3, **values))
    assert events.Tags()["scalars"] == list(values)
    for tag, value in values.items():
        (event,) = events.Scalars(tag)
        single = torch.tensor(float(value)).item()
        assert event.value == pytest.approx(single, rel=0, abs=0, nan_ok=True)
        assert (event.step, event.wall_time) == (3, 1e9 + 3)


def test_what_a_resumed_run_does_again_stands_once(tmp_path: Path) -> None:
    """A crash after step 3, a resume from step 1: TensorBoard drops the old steps 2 and 3."""
    write(tmp_path, *(record(step, x=step) for step in (1, 2, 3)))
    events = write(tmp_path, record(2, x=2.0), purge_step=2)
    assert [event.step for event in events.Scalars("x")] == [1, 2]


def test_texts_and_histograms(tmp_path: Path) -> None:
    values = torch.linspace(-1, 1, 100)
    both = OnHost(torch.stack([spread(values), spread(values * torch.nan), spread(values * 0)]))
    names = ["weights/a", "weights/b", "weights/c"]
    note = Media("text", ["val/note"], "*größer*", 6)
    events = write(tmp_path, note, Media("histogram", names, both, 7))
    (text,), (found,) = events.Tensors("val/note"), events.Histograms("weights/a")
    assert (text.step, found.step) == (6, 7)
    assert make_ndarray(text.tensor_proto).item().decode() == "*größer*"
    one, flat = found.histogram_value, events.Histograms("weights/c")[0].histogram_value
    assert (one.min, one.max, one.num, sum(one.bucket), len(one.bucket)) == (-1, 1, 100, 100, 30)
    assert one.bucket_limit[-1] == 1 and one.sum_squares == pytest.approx(values.square().sum())
    assert (flat.min, flat.max, sum(flat.bucket)) == (0, 0, 100)
    assert set(events.Tags()["histograms"]) == {"weights/a", "weights/c"}  # not without a number


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (1, 3), (1, 4), (2, 1), (2, 3), (2, 4)])
def test_pictures(count: int, channels: int, tmp_path: Path) -> None:
    """Several are laid out side by side."""
    pixels = torch.arange(count * channels * 6, dtype=torch.uint8).view(count, channels, 2, 3)
    (event,) = write(tmp_path, Media("image", ["val/x"], OnHost(pixels), 5)).Images("val/x")
    assert (event.step, event.width, event.height) == (5, 3 * count, 2)
    shown = np.asarray(PIL.Image.open(io.BytesIO(event.encoded_image_string)))
    expected = torch.cat(list(pixels), dim=2).permute(1, 2, 0)
    assert np.array_equal(shown, expected.expand(-1, -1, max(channels, 3)))


def test_a_picture_of_fractions(tmp_path: Path) -> None:
    values = OnHost(torch.tensor([[[[0.0, 0.5, 1.0, -3.0, 7.0]]]]))
    (event,) = write(tmp_path, Media("image", ["x"], values, 5)).Images("x")
    shown = np.asarray(PIL.Image.open(io.BytesIO(event.encoded_image_string)))
    assert shown[0, :, 0].tolist() == [0, 127, 255, 0, 255]


def test_config_and_hparams(tmp_path: Path) -> None:
    """In the run's own file: what a step depends on, metrics, and that it succeeded."""
    folder = tmp_path / "run" / "tensorboard"
    events = write(folder, record(8, x=1.0), purge_step=8, completed=True)
    (config,) = events.Tensors("config")
    assert config.step == 7  # a later attempt's purge leaves it alone
    assert make_ndarray(config.tensor_proto).item().decode() == f"```yaml\n{CFG.dump()}```"

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
    assert [m.name.tag for m in experiment.metric_infos] == ["val/loss", "train/loss"]
    assert [h.name for h in experiment.hparam_infos if h.differs] == ["OPTIM.LR"]  # the user's
    assert {h.name for h in experiment.hparam_infos} == set(start.hparams)
    end = hparams.parse_session_end_info_plugin_data(content(hparams.SESSION_END_INFO_TAG))
    assert end.status == 1
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1


def test_after_a_full_disk_every_number_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on in the same file, whole: torch's writer would stay silent."""
    sink, whole = EventFile(tmp_path, 1, CFG), AppendFile._write
    full = False

    def limited(self: AppendFile, file: Any, piece: bytes) -> None:
        whole(self, file, piece[:33] if full else piece)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AppendFile, "_write", limited)
    waiting: list[Record] = []
    for step in range(1, 30):
        full = step < 5 or 10 <= step < 20
        waiting.append(record(step, **{"train/loss": 1 / step}))
        if full:
            with pytest.raises(OSError):
                sink.write(waiting)
        else:
            sink.write(waiting)
            waiting = []
        events_in(tmp_path)  # never torn
    sink.close(False)
    found = {event.step: event.value for event in read(tmp_path).Scalars("train/loss")}
    assert found == {step: np.float32(1 / step) for step in range(1, 30)}
    steps = [e.step for e in events_in(tmp_path) if e.summary.value]
    assert [step for step in steps if step] == [*range(1, 30)]
    assert len(steps) == 29 + 3  # config, hparams and metrics


def test_nothing_is_made_without_a_record(tmp_path: Path) -> None:
    EventFile(tmp_path / "tensorboard", 1, CFG).close(False)
    assert list(tmp_path.iterdir()) == []
