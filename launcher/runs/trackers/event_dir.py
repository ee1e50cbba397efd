"""A run as TensorBoard's event file in a folder of its own, say below a log directory that many
share."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.plugins.hparams.metadata import (
    NULL_TENSOR,
    SESSION_END_INFO_TAG,
    create_summary_metadata,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from launcher.runs.trackers import Memory, Published, Record, Tracker
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import AppendFile


class EventDir(Tracker):
    """The scalars of the run's own event files, each once; config keys are hyperparameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, run: Published, memory: Memory, remember: Callable[[], None]) -> bool:
        folder = self.folder / run.name
        self.memory = memory
        path = folder / f"events.out.tfevents.{run.began:010.0f}.launcher.{run.key}"
        length, size = memory.get("length", 0), path.stat().st_size if path.exists() else 0
        if size < length:  # somebody has removed it
            length = 0
        if size > length:  # written by a call that was killed before it could write it down
            os.truncate(path, length)
        self.file = AppendFile(path)
        if not length:
            self._append([Event(wall_time=run.began, file_version="brain.Event:2")])
        return length > 0

    def configure(self, run: Published) -> list[str]:
        plain = (bool, int, float, str)
        values: Any = {k: v if isinstance(v, plain) else str(v) for k, v in run.config.items()}
        lines = "\n".join(f"{key}: {value}" for key, value in run.config.items())
        summaries = [
            hparams_pb(values, run.key, run.began),
            text_pb("config", f"```\n{lines}\n```"),
        ]
        self._append([Event(wall_time=run.began, summary=summary) for summary in summaries])
        return []

    def send(self, first: int, records: Sequence[Record]) -> None:
        self._append(
            [
                Event(
                    step=record["step"],
                    wall_time=record["time"],
                    summary=Summary(
                        value=[
                            Summary.Value(tag=key, simple_value=value)
                            for key, value in record.items()
                            if key not in POSITION
                        ]
                    ),
                )
                for record in records
            ]
        )

    def _append(self, events: list[Event]) -> None:
        piece = io.BytesIO()
        for event in events:
            RecordWriter(piece).write(event.SerializeToString())
        self.file.append(piece.getvalue())
        self.memory["length"] = self.file.length

    def finish(self, state: str, reason: str, at: float) -> None:
        if state == "running":
            self.file.close()
            return
        told = f"{state} ({reason})" if reason else state
        status = STATUS_SUCCESS if state == "completed" else STATUS_FAILURE
        end = SessionEndInfo(status=status, end_time_secs=at)
        described = create_summary_metadata(HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=SESSION_END_INFO_TAG, metadata=described, tensor=NULL_TENSOR)
        summaries = [text_pb("status", told), Summary(value=[value])]
        self._append([Event(wall_time=at, summary=summary) for summary in summaries])
        self.file.close()
