"""All log lines of a rank pass here: those of its loader workers come in, repeats stay out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import threading
from collections.abc import Iterable, Sequence

from launcher.telemetry.repeats import Repeats

PASSED = ("name", "levelno", "levelname", "created", "file_only")


class Funnel(logging.Handler):
    """Hands on to other handlers what is no repeat.

    A forked loader worker, which has none of the rank's threads and must not move its files, sends
    its lines through a pipe. One piece of a pipe is cut at 4 kB, and lost where nobody reads on.
    """

    def __init__(self, targets: Sequence[logging.Handler]) -> None:
        super().__init__()
        self.targets, self.repeats, self.pid = targets, Repeats(), os.getpid()
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.thread = threading.Thread(
            target=self._receive, args=(reader,), name="workers' logs", daemon=True
        )
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if os.getpid() == self.pid:
                self._hand_on(self.repeats(record))
            else:
                self._send(record)
        except Exception:  # a log call whose arguments do not fit its text, say
            self.handleError(record)

    def _hand_on(self, records: Iterable[logging.LogRecord]) -> None:
        for record in records:
            for target in self.targets:
                if record.levelno >= target.level:
                    target.handle(record)

    def _send(self, record: logging.LogRecord) -> None:
        text, entry = self.format(record), {k: getattr(record, k, None) for k in PASSED}
        while len(line := json.dumps({**entry, "msg": text}).encode()) >= select.PIPE_BUF:
            text = text[: len(text) // 2]
        with contextlib.suppress(OSError):
            os.write(self.pipe, line + b"\n")

    def _receive(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                if line == b"\n":  # from `close`
                    return
                self.handle(logging.makeLogRecord(json.loads(line)))

    def end(self) -> None:
        """Hand on the lines that are still in the pipe, and the counts that nobody has seen."""
        if os.getpid() != self.pid:
            return
        if self.thread.is_alive():
            with contextlib.suppress(OSError):
                os.write(self.pipe, b"\n")
            self.thread.join(5)
        self.acquire()
        try:
            self._hand_on(self.repeats.end())
        finally:
            self.release()

    def close(self) -> None:
        self.end()
        os.close(self.pipe)
        super().close()
