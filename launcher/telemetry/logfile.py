"""The handler of a rank's log file, which is rotated by size, and its format as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
from pathlib import Path
from typing import Any

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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

    def doRollover(self) -> None:
        # Closing a file writes what is left of it: on a full disk that fails, and it is closed.
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.close()
            self.stream = None  # type: ignore[assignment]
        super().doRollover()

    def handleError(self, record: logging.LogRecord) -> None:
        pass
