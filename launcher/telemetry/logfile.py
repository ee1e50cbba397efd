"""Log handlers that hold back repeats: the console's colours, and files that are rotated by size.

A loader worker that is forked writes through the same open files, but rotates and locks nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

from launcher.telemetry.repeats import Repeats

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


class JsonFormatter(logging.Formatter):
    """A line of strict JSON a log record: time, level, logger, message, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file of at most so many bytes (0: no limit), with older ones beside it as .1, .2, ...

    A line that cannot be written (a full disk) is lost, and nothing else.
    """

    def __init__(self, path: Path, form: str, file_mb: float, files_kept: int) -> None:
        most = int(file_mb * (1 << 20))
        super().__init__(path, maxBytes=most, backupCount=files_kept, encoding="utf-8")
        self.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
        self.repeats, self.pid = Repeats(), os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        for one in self.repeats(record):
            super().emit(one)

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        # A worker's file is the rank's: only the rank itself may move it.
        return os.getpid() == self.pid and bool(super().shouldRollover(record))

    def doRollover(self) -> None:
        # Closing a file writes what is left of it: on a full disk that fails, and it is closed.
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.close()
            self.stream = None  # type: ignore[assignment]
        super().doRollover()

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        self.acquire()
        try:
            for one in self.repeats.end():
                super().emit(one)
        finally:
            self.release()
        super().close()


def coloured(line: str, level: int) -> str:
    """The line in its level's colour where stderr is a terminal that wants colours."""
    code = COLOURS.get(level)
    return f"\x1b[{code}m{line}\x1b[0m" if code and wants_colour() else line


def wants_colour() -> bool:
    """https://no-color.org, and terminals that have none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain
