"""TensorBoard's event files: the numbers of metrics.jsonl, the config, pictures and histograms.

The events are TensorBoard's own protocol buffers, framed by its own RecordWriter; only the file is
ours. Its writers (torch's SummaryWriter uses one) are no good for a run of days: after one failed
write they stay silent, with a torn event in the file.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from launcher.config import defaults, flatten
from launcher.telemetry.media import Media, buckets, png
from launcher.telemetry.recorder import Record
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import FileSink

# Keys that no step depends on: they are no hyperparameters.
NOT_HPARAMS = ("OUTPUT_DIR", "LOG.", "CHECKPOINT.", "EVAL.", "DIST.", "DATALOADER.")
SCALAR = scalar_plugin.create_summary_metadata(display_name="", description="")
IMAGE = image_plugin.create_summary_metadata(display_name="", description="")
HISTOGRAM = histogram_plugin.create_summary_metadata(display_name="", description="")


class TensorBoard(FileSink):
    """One event file an attempt.

    Numbers are in single precision: TensorBoard's fast loader shows no scalars stored in double
    precision. `purge_step` is the first step to come, also in a run's first attempt: a viewer that
    is running drops what it has of it and after when an attempt that resumes starts its own file.
    """

    name = "TensorBoard's event file"

    def __init__(
        self,
        directory: Path,
        purge_step: int,
        config: str = "",
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` is shown as text, `hparams` (dotted keys) on the page of hyperparameters."""
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        super().__init__(directory / name)
        self.records = RecordWriter(self.piece)
        start = SessionLog(status=SessionLog.START)
        self._add(purge_step, time.time(), file_version="brain.Event:2")
        self._add(purge_step, time.time(), session_log=start)
        # Not after what this attempt will do: the next one's purge must leave them alone.
        before, now = purge_step - 1, time.time()
        if config:
            fenced = f"```yaml\n{config}```"
            self._add(before, now, summary=text_pb("config", fenced))
        self.hparams: dict[str, bool | float | str] = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in (hparams or {}).items()
            if not key.startswith(NOT_HPARAMS)
        }
        self.described = not hparams
        if hparams:
            trial = str(directory.absolute().parent)  # two runs of one config are two rows
            self._add(before, now, summary=hparams_pb(self.hparams, trial, now))

    def write(self, record: Record) -> None:
        summary = Summary()
        with np.errstate(over="ignore"):  # 1e300 is infinite in single precision
            for key, value in record.items():
                if key not in POSITION:
                    tensor = TensorProto(dtype="DT_FLOAT", float_val=[np.float32(value)])
                    summary.value.add(tag=key, metadata=SCALAR, tensor=tensor)
        self._add(record["step"], record["time"], summary=summary)
        if metrics := [key for key in record if key.startswith("val/")]:
            self._describe([*metrics, "train/loss"], record["step"])

    def show(self, media: Media) -> None:
        if isinstance(media.value, str):
            self._add(media.step, media.time, summary=text_pb(media.names[0], media.value))
            return
        arrays, summary = media.value.read(), Summary()
        if media.kind == "image":
            height, width = arrays.shape[-2:]
            parts = [str(width).encode(), str(height).encode(), *map(png, arrays)]
            tensor = make_tensor_proto(np.array(parts, dtype=object))
            summary.value.add(tag=media.names[0], metadata=IMAGE, tensor=tensor)
        else:
            for name, found in zip(media.names, arrays, strict=True):
                if (rows := buckets(found)) is not None:
                    tensor = make_tensor_proto(rows.astype(np.float64))
                    summary.value.add(tag=name, metadata=HISTOGRAM, tensor=tensor)
        self._add(media.step, media.time, summary=summary)

    def _describe(self, metrics: list[str], step: int) -> None:
        """Say once which metrics the page of hyperparameters shows: it takes their last values.

        Without it TensorBoard takes all there are, but finds the values of none where its --logdir
        is the run's own folder. Keys that the user set, or the task added, come first.
        """
        if self.described:
            return
        self.described = True
        built_in = flatten(defaults())
        kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
        experiment = api_pb2.Experiment(time_created_secs=time.time())
        for key, value in self.hparams.items():
            kind = kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64)
            set_by_user = str(value) != str(built_in.get(key))
            experiment.hparam_infos.add(name=key, type=kind, differs=set_by_user)
        for tag in metrics:
            experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag))
        self._hparams_event(hparams_plugin.EXPERIMENT_TAG, step, experiment=experiment)

    def finish(self) -> None:
        """Tell the page of hyperparameters that the run succeeded."""
        self._describe(["train/loss"], 0)  # a run without an evaluation
        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time()
        )
        self._hparams_event(hparams_plugin.SESSION_END_INFO_TAG, 0, session_end_info=end)

    def _hparams_event(self, tag: str, step: int, **content: Any) -> None:
        data = plugin_data_pb2.HParamsPluginData(**content)
        metadata = hparams_plugin.create_summary_metadata(data)
        summary = Summary()
        summary.value.add(tag=tag, metadata=metadata, tensor=hparams_plugin.NULL_TENSOR)
        self._add(step, time.time(), summary=summary)

    def _add(self, step: int, wall_time: float, **content: Any) -> None:
        event = Event(step=step, wall_time=wall_time, **content)
        self.records.write(event.SerializeToString())
        self.add()
