"""What a sink is, and metrics.jsonl. The others are telemetry/console.py and tensorboard.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from launcher.telemetry.append import AppendFile
from launcher.telemetry.media import Media

# One metrics record: step, epoch, samples, time, and a number for each metric.
Record = dict[str, Any]


class Sink:
    """Where records and media go. The writing thread alone calls it."""

    name = ""  # for people
    essential = False  # whether a checkpoint needs all records in it

    def write(self, items: Sequence[Record | Media]) -> None:
        """Write all of these. Raises OSError where none could be written: they come again."""
        raise NotImplementedError

    def close(self, completed: bool) -> None:
        """End, after all that was written; `completed`: so is the run."""


class JsonLines(Sink):
    """metrics.jsonl: a line a record."""

    essential = True

    def __init__(self, path: Path) -> None:
        self.name, self.file = str(path), AppendFile(path)

    def write(self, items: Sequence[Record | Media]) -> None:
        records = (item for item in items if isinstance(item, dict))
        option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
        self.file.append(
            b"".join(orjson.dumps(strict(record), option=option) for record in records)
        )

    def close(self, completed: bool) -> None:
        self.file.close()


def strict(record: Mapping[str, Any]) -> Record:
    """The record as strict JSON has it: NaN and infinity as null, their keys under `nonfinite`."""
    bad = [key for key, value in record.items() if not math.isfinite(value)]
    return {**record, **dict.fromkeys(bad), "nonfinite": bad} if bad else dict(record)
