"""TensorBoard's event files: the numbers of metrics.jsonl, the config, pictures and histograms.

The events are those of torch's SummaryWriter, framed by TensorBoard's own RecordWriter; only the
file is ours. Their writers are no good for a run of days: after one failed write they stay silent,
with a torn event in the file.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from launcher.callbacks import Run
from launcher.config import CfgNode, defaults, flatten
from launcher.tasks.pictures import BUCKETS
from launcher.telemetry.media import Media
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import AppendFile, Record, Sink

# Keys that no step depends on: they are no hyperparameters.
NOT_HPARAMS = ("OUTPUT_DIR", "LOG.", "CHECKPOINT.", "EVAL.", "DIST.", "DATALOADER.")
# Now, not by the first picture in the writing thread: see `shipped` in launcher/callbacks.
PIL.Image.preinit()


class TensorBoard:
    """tensorboard/: what is recorded, as event files, by LOG.TENSORBOARD."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def sink(self) -> Sink:
        run = self.run
        return EventFile(run.directory / "tensorboard", run.progress.step + 1, run.cfg)


class EventFile(Sink):
    """One event file an attempt, made with its first write.

    `purge_step` is the first step to come, also in a run's first attempt: a viewer that is running
    drops what it has of it and after when an attempt that resumes starts its own file.
    """

    name = "TensorBoard's event file"

    def __init__(self, directory: Path, purge_step: int, cfg: CfgNode) -> None:
        now = time.time()
        name = f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = AppendFile(directory / name)
        values = hyperparameters(cfg)
        shown = dict.fromkeys([cfg.CHECKPOINT.METRIC, "val/loss", "train/loss"], 0.0)
        experiment, _, end = summary.hparams(values, shown)
        _set_first(experiment, values)
        trial = str(directory.absolute().parent)  # two runs of one config are two rows
        texts = text_pb("config", f"```yaml\n{cfg.dump()}```")
        # Not after what this attempt will do: the next one's purge must leave them alone.
        before = [texts, experiment, hparams_pb(values, trial, now)]
        start = SessionLog(status=SessionLog.START)
        # What the next write begins with.
        self.first = [
            Event(step=purge_step, wall_time=now, file_version="brain.Event:2"),
            Event(step=purge_step, wall_time=now, session_log=start),
            *(Event(step=purge_step - 1, wall_time=now, summary=one) for one in before),
        ]
        self.end = Event(wall_time=now, summary=end)

    def write(self, items: Sequence[Record | Media]) -> None:
        piece = io.BytesIO()
        records = RecordWriter(piece)
        for event in [*self.first, *map(_event, items)]:
            records.write(event.SerializeToString())
        self.file.append(piece.getvalue())
        self.first = []

    def close(self, completed: bool) -> None:
        if completed:
            self.first.append(self.end)
            self.write([])
        self.file.close()


def hyperparameters(cfg: CfgNode) -> dict[str, bool | int | float | str]:
    """The keys that steps depend on."""
    values = {k: v for k, v in flatten(cfg).items() if not k.startswith(NOT_HPARAMS)}
    return {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}


def _set_first(experiment: Summary, values: Mapping[str, Any]) -> None:
    """Mark the keys that the user set or the task added: TensorBoard shows these first."""
    plugin, built_in = experiment.value[0].metadata.plugin_data, flatten(defaults())
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = str(values[info.name]) != str(built_in.get(info.name))
    plugin.content = data.SerializeToString()


def _event(item: Record | Media) -> Event:
    if isinstance(item, Media):
        return Event(step=item.step, wall_time=item.time, summary=_summary(item))
    numbers = (pair for pair in item.items() if pair[0] not in POSITION)
    values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers]
    return Event(step=item["step"], wall_time=item["time"], summary=Summary(value=values))


def _summary(media: Media) -> Summary:
    if isinstance(media.value, str):
        return text_pb(media.names[0], media.value)
    array, found = media.value.read(), Summary()
    if media.kind == "image":
        if array.shape[1] == 4:  # torch's grid of pictures is for 1 and 3 channels
            return summary.image(media.names[0], np.concatenate(array, axis=2), dataformats="CHW")
        return summary.image(media.names[0], array)
    for name, (low, high, total, squares, *counts) in zip(media.names, array, strict=True):
        if np.isfinite(low):
            limits = np.linspace(low, high, BUCKETS + 1)[1:]
            row = (low, high, sum(counts), total, squares, limits, counts)
            found.MergeFrom(summary.histogram_raw(name, *row))
    return found
