"""Where records go: JSON lines, TensorBoard, the console."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonlines

from launcher.telemetry.console import Console, plain
from launcher.telemetry.recorder import POSITION, Record

logger = logging.getLogger(__name__)


def strict(record: Record) -> Record:
    """The record as strict JSON has it: NaN and infinity as null, their keys under `nonfinite`."""
    bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    if not bad:
        return record
    return {**record, **dict.fromkeys(bad), "nonfinite": bad}


class JsonLines:
    """metrics.jsonl: a line a record, on disk as soon as it is written.

    A record that cannot be written (a full disk) waits, and is tried again with the next one.
    """

    def __init__(self, path: Path) -> None:
        # Unbuffered: what failed must not be written later by itself, after a part of it.
        self.file = path.open("ab", buffering=0)
        dumps = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
        self.waiting = io.BytesIO()
        self.writer = jsonlines.Writer(self.waiting, dumps=dumps)
        self.told = False

    def write(self, record: Record) -> None:
        self.writer.write(strict(record))
        self.flush()

    def flush(self) -> bool:
        lines, length = self.waiting.getvalue(), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(length)  # no torn line
            if not self.told:
                logger.warning("%s cannot be written: %s; it is tried again", self.file.name, error)
            self.told = True
            return False
        self.waiting.seek(0)
        self.waiting.truncate()
        return True

    def close(self) -> None:
        self.flush()
        self.writer.close()
        self.file.close()


class TensorBoard:
    """The same numbers under the same names as event files, in single precision.

    TensorBoard's fast loader shows no scalars stored in double precision, so none are.
    `purge_step` is the first step to come, also in a run's first attempt: a viewer that is running
    drops what it has of it and after when an attempt that resumes starts its own file.
    """

    def __init__(self, directory: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs a second to import

        self.writer: Any = SummaryWriter(str(directory), purge_step=purge_step)
        self.failed = False

    def write(self, record: Record) -> None:
        self._try(lambda: self._add(record))

    def _add(self, record: Record) -> None:
        step, time = record["step"], record["time"]
        for key, value in record.items():
            if key not in POSITION:
                self.writer.add_scalar(key, value, step, walltime=time, new_style=True)

    def flush(self) -> bool:
        self._try(self.writer.flush)
        return True

    def close(self) -> None:
        self._try(self.writer.close)

    def _try(self, call: Callable[[], None]) -> None:
        """A writer that has failed once (a full disk) stays silent: its file may be torn."""
        if self.failed:
            return
        try:
            call()
        except OSError as error:
            self.failed = True
            logger.warning("TensorBoard gets nothing from here on: %s", error)


class ConsoleLines:
    """A line a record in the log, and the same values beside the progress bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, record: Record) -> None:
        line = summary(record)
        evaluation = not any(key.startswith("train/") for key in record)
        # On a terminal the bar shows training records; evaluations deserve a line there too.
        logger.info(line, extra=plain(not evaluation and self.console.interactive))
        self.console.update(record)

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        self.console.close()


def summary(record: Record) -> str:
    """One line of a record: `step 20  epoch 1  train/loss 1.234  ...`, system figures left out."""
    parts = [f"step {record['step']}", f"epoch {record['epoch']}"]
    for key, value in record.items():
        if key not in POSITION and not key.startswith("system/"):
            parts.append(f"{key.removeprefix('train/')} {value:.4g}")
    return "  ".join(parts)
