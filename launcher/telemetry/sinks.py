"""Where records go: JSON lines and the console. TensorBoard is in telemetry/tensorboard.py."""

from __future__ import annotations

import io
import json
import logging
import math
from datetime import timedelta
from pathlib import Path

import jsonlines

from launcher.telemetry.append import AppendFile
from launcher.telemetry.console import Console
from launcher.telemetry.recorder import Record, Sink
from launcher.telemetry.rundir import POSITION

logger = logging.getLogger(__name__)


def strict(record: Record) -> Record:
    """The record as strict JSON has it: NaN and infinity as null, their keys under `nonfinite`."""
    bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    if not bad:
        return record
    return {**record, **dict.fromkeys(bad), "nonfinite": bad}


class FileSink(Sink):
    """A sink with a file. A library's writer fills `piece`, and `add` puts it into the file whole:
    what cannot be written (a full disk) waits, and is tried again with the next record."""

    def __init__(self, path: Path) -> None:
        self.file, self.piece = AppendFile(path), io.BytesIO()

    def add(self) -> None:
        self.file.add(self.piece.getvalue())
        self.piece.seek(0)
        self.piece.truncate()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class JsonLines(FileSink):
    """metrics.jsonl: a line a record."""

    essential = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.name = str(path)
        dumps = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
        self.writer = jsonlines.Writer(self.piece, dumps=dumps)

    def write(self, record: Record) -> None:
        self.writer.write(strict(record))
        self.add()


class ConsoleLines(Sink):
    """A line a record in the log, and the same values beside the progress bar on a terminal."""

    name = "the console"

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, record: Record) -> None:
        line = summary(record)
        evaluation = not any(key.startswith("train/") for key in record)
        # On a terminal the bar shows training records; evaluations deserve a line there too.
        file_only = not evaluation and self.console.interactive
        logger.info(line, extra={"file_only": file_only})
        self.console.update(record)

    def close(self) -> None:
        self.console.close()


def summary(record: Record) -> str:
    """One line of a record: `step 20  epoch 1  loss 1.234  ...  eta 0:03:20`, system figures left
    out."""
    parts = [f"step {record['step']}", f"epoch {record['epoch']}"]
    for key, value in record.items():
        if key not in POSITION and not key.startswith("system/") and key != "perf/eta_s":
            parts.append(f"{key.removeprefix('train/')} {value:.4g}")
    if "perf/eta_s" in record:
        parts.append(f"eta {timedelta(seconds=round(record['perf/eta_s']))}")
    return "  ".join(parts)
