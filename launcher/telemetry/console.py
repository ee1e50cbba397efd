"""What a person at rank 0 sees: log lines, among them one a record."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from launcher.telemetry.media import Media
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import Record, Sink

logger = logging.getLogger(__name__)
COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


class LogLines(Sink):
    """A line a record in the log."""

    name = "the log"

    def write(self, items: Sequence[Record | Media]) -> None:
        for record in items:
            if isinstance(record, dict):
                # A progress bar shows these; evaluations deserve a line above it too.
                logger.info(summary(record), extra={"training": "train/loss" in record})


class ConsoleHandler(logging.StreamHandler):
    """Log lines on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if os.getpid() == self.pid:
            super().emit(record)
            return
        # A loader worker: the stream and its lock may have been in use when it was forked.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def format(self, record: logging.LogRecord) -> str:
        """The line, in its level's colour where stderr is a terminal that wants colours."""
        line, code = super().format(record), COLOURS.get(record.levelno)
        return f"\x1b[{code}m{line}\x1b[0m" if code and wants_colour() else line


def wants_colour() -> bool:
    """https://no-color.org, and terminals that have none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain


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
