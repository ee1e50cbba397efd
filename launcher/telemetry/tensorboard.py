"""TensorBoard's event files: the numbers of metrics.jsonl, the config, pictures and histograms.

The events are TensorBoard's own protocol buffers, framed by its own RecordWriter; only the file is
ours. Its writers (torch's SummaryWriter uses one) are no good for a run of days: after one failed
write they stay silent, with a torn event in the file.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config import defaults, flatten
from launcher.telemetry.append import AppendFile
from launcher.telemetry.media import Media, OnHost, buckets, png
from launcher.telemetry.recorder import POSITION, Record

# Keys that no step depends on: they are no hyperparameters.
NOT_HPARAMS = ("OUTPUT_DIR", "LOG.", "CHECKPOINT.", "EVAL.", "DIST.", "DATALOADER.")


class TensorBoard:
    """One event file an attempt.

    Numbers are in single precision: TensorBoard's fast loader shows no scalars stored in double
    precision. `purge_step` is the first step to come, also in a run's first attempt: a viewer that
    is running drops what it has of it and after when an attempt that resumes starts its own file.
    What cannot be written (a full disk) waits, and is tried again with the next record.
    """

    name, essential = "TensorBoard's event file", False

    def __init__(
        self,
        directory: Path,
        purge_step: int,
        config: str = "",
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` is shown as text, `hparams` (dotted keys) on the page of hyperparameters."""
        # Imported here: only a run needs them; all of them now, since a module that another thread
        # is importing cannot be imported by a worker that is forked meanwhile.
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.plugins.histogram import metadata as histogram
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
        from tensorboard.plugins.hparams import metadata as hparams_metadata
        from tensorboard.plugins.image import metadata as image
        from tensorboard.plugins.scalar import metadata as scalar
        from tensorboard.plugins.text import summary_v2 as text
        from tensorboard.summary.writer.record_writer import RecordWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        self.event, self.summary, self.tensor = event_pb2.Event, summary_pb2, tensor_pb2.TensorProto
        self.text_pb, self.make_tensor = text.text_pb, make_tensor_proto
        self.image_metadata, self.histogram_metadata = image, histogram
        self.hparams_metadata, self.hparams_data = hparams_metadata, plugin_data_pb2
        self.hparams_api, self.success = api_pb2, api_pb2.STATUS_SUCCESS
        self.scalar_metadata = scalar.create_summary_metadata(display_name="", description="")
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = AppendFile(directory / name, new=True)
        self.framed = io.BytesIO()
        self.records = RecordWriter(self.framed)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(purge_step, time.time(), file_version="brain.Event:2")
        self._add(purge_step, time.time(), session_log=start)
        # Not after what this attempt will do: the next one's purge must leave them alone.
        before, now = purge_step - 1, time.time()
        if config:
            fenced = f"```yaml\n{config}```"
            self._add(before, now, summary=self.text_pb("config", fenced))
        self.hparams: dict[str, bool | float | str] = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in (hparams or {}).items()
            if not key.startswith(NOT_HPARAMS)
        }
        self.described = not hparams
        if hparams:
            trial = str(directory.absolute().parent)  # two runs of one config are two rows
            self._add(before, now, summary=summary_v2.hparams_pb(self.hparams, trial, now))

    def write(self, record: Record) -> None:
        summary = self.summary.Summary()
        with np.errstate(over="ignore"):  # 1e300 is infinite in single precision
            for key, value in record.items():
                if key not in POSITION:
                    tensor = self.tensor(dtype="DT_FLOAT", float_val=[np.float32(value)])
                    summary.value.add(tag=key, metadata=self.scalar_metadata, tensor=tensor)
        self._add(record["step"], record["time"], summary=summary)
        if metrics := [key for key in record if key.startswith("val/")]:
            self._describe([*metrics, "train/loss"], record["step"])

    def show(self, media: Media) -> None:
        if isinstance(media.value, OnHost):
            arrays = media.value.read()
            summary = self.summary.Summary()
            if media.kind == "image":
                self._image(summary, media.names[0], arrays)
            else:
                for name, found in zip(media.names, arrays, strict=True):
                    self._histogram(summary, name, found)
        else:
            summary = self.text_pb(media.names[0], media.value)
        self._add(media.step, media.time, summary=summary)

    def _image(self, summary: Any, name: str, images: np.ndarray) -> None:
        height, width = images.shape[-2:]
        parts = [str(width).encode(), str(height).encode(), *map(png, images)]
        summary.value.add(
            tag=name,
            metadata=self.image_metadata.create_summary_metadata("", ""),
            tensor=self.make_tensor(np.array(parts, dtype=object)),
        )

    def _histogram(self, summary: Any, name: str, found: np.ndarray) -> None:
        if (rows := buckets(found)) is not None:
            metadata = self.histogram_metadata.create_summary_metadata("", "")
            tensor = self.make_tensor(rows.astype(np.float64))
            summary.value.add(tag=name, metadata=metadata, tensor=tensor)

    def _describe(self, metrics: list[str], step: int) -> None:
        """Say once which metrics the page of hyperparameters shows: it takes their last values.

        Without it TensorBoard takes all there are, but finds the values of none where its --logdir
        is the run's own folder. Keys that the user set, or the task added, come first.
        """
        if self.described:
            return
        self.described = True
        built_in = flatten(defaults())
        api = self.hparams_api
        kinds = {bool: api.DATA_TYPE_BOOL, str: api.DATA_TYPE_STRING}
        experiment = api.Experiment(time_created_secs=time.time())
        for key, value in self.hparams.items():
            default = built_in.get(key)
            set_by_user = value != (
                default if isinstance(value, (bool, int, float)) else str(default)
            )
            kind = kinds.get(type(value), api.DATA_TYPE_FLOAT64)
            experiment.hparam_infos.add(name=key, type=kind, differs=set_by_user)
        for tag in metrics:
            experiment.metric_infos.add(name=api.MetricName(tag=tag))
        self._hparams_event(self.hparams_metadata.EXPERIMENT_TAG, step, experiment=experiment)

    def finish(self) -> None:
        """Tell the page of hyperparameters that the run succeeded."""
        self._describe(["train/loss"], 0)  # a run without an evaluation
        end = self.hparams_data.SessionEndInfo(status=self.success, end_time_secs=time.time())
        self._hparams_event(self.hparams_metadata.SESSION_END_INFO_TAG, 0, session_end_info=end)

    def _hparams_event(self, tag: str, step: int, **content: Any) -> None:
        data = self.hparams_data.HParamsPluginData(**content)
        metadata = self.hparams_metadata.create_summary_metadata(data)
        summary = self.summary.Summary()
        summary.value.add(tag=tag, metadata=metadata, tensor=self.hparams_metadata.NULL_TENSOR)
        self._add(step, time.time(), summary=summary)

    def _add(self, step: int, wall_time: float, **content: Any) -> None:
        event = self.event(step=step, wall_time=wall_time, **content)
        self.records.write(event.SerializeToString())
        self.file.add(self.framed.getvalue())
        self.framed.seek(0)
        self.framed.truncate()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
