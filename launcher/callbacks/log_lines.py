"""A line a record in the log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from launcher.callbacks import Run
from launcher.log import get_logger
from launcher.telemetry.media import Media
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import Record, Sink

logger = get_logger("launcher")


class LogLines:
    """Tells people of each record, on the console and in the log file."""

    def __init__(self, run: Run) -> None:
        """Nothing of the run is needed."""

    def sink(self) -> Sink:
        return Lines()


class Lines(Sink):
    name = "the log"

    def write(self, items: Sequence[Record | Media]) -> None:
        for record in items:
            # A digest alone is for tools.
            if isinstance(record, dict) and record.keys() - {*POSITION, "digest"}:
                # A progress bar shows these; evaluations deserve a line above it too.
                training = any(key.startswith("train/") for key in record)
                logger.info(summary(record), extra={"training": training})


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
