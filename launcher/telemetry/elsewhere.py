"""Warnings of ranks other than 0: on the console once, though every rank may give the same one.

Ranks have no channel for this but the run directory. So a warning of rank K waits a moment, and is
shown with its rank unless rank 0, or a lower rank of the same host, has it in its log file by then.
Where those files cannot be read it is shown. Errors never wait.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

WAIT_S = 2.0
TAIL = 1 << 18  # bytes of a log file that are looked at
SLACK_S = 60.0  # by which the clocks of hosts may differ
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([^ :]+): (.*)")

# What makes two warnings the same: level, logger and first line.
Same = tuple[str, str, str]


class Elsewhere:
    """The warnings of this rank that wait to be shown."""

    def __init__(
        self, rank: int, local_rank: int, show: Callable[[logging.LogRecord], None]
    ) -> None:
        self.show = show
        first = rank - local_rank
        self.lower = sorted({0, *range(first, rank)})
        self.started = time.time()
        self.folder: Path | None = None
        self.waiting: deque[tuple[float, logging.LogRecord]] = deque()
        self.wake = threading.Condition()
        self.closed = False
        self.thread: threading.Thread | None = None

    def add(self, record: logging.LogRecord) -> None:
        with self.wake:
            self.waiting.append((time.monotonic() + WAIT_S, record))
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="warnings", daemon=True)
                self.thread.start()
            self.wake.notify()

    def open(self, folder: Path) -> None:
        """The folder of the log files; until then nothing can be compared, so all wait."""
        with self.wake:
            self.folder = folder
            later = time.monotonic() + WAIT_S  # the other ranks are opening theirs
            self.waiting = deque((later, record) for _, record in self.waiting)
            self.wake.notify()

    def close(self) -> None:
        """Decide on what still waits."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        if self.thread is not None:
            self.thread.join(10)

    def _run(self) -> None:
        while True:
            with self.wake:
                while not self.closed and not (self.waiting and self.folder):
                    self.wake.wait()
                if not self.waiting:
                    return  # closed
                left = self.waiting[0][0] - time.monotonic()
                if left > 0 and not self.closed:
                    self.wake.wait(left)
                    continue
                _, record = self.waiting.popleft()
            if not self.given(record):
                self.show(record)

    def given(self, record: logging.LogRecord) -> bool:
        """Whether a lower rank has given the same warning in this attempt."""
        if self.folder is None:
            return False
        # Of a count, the message that is counted: the lower rank counts it too.
        lines = getattr(record, "repeated", record.getMessage()).splitlines()
        same = record.levelname, record.name, lines[0] if lines else ""
        return any(same in set(read(path, self.started - SLACK_S)) for path in self._files())

    def _files(self) -> Iterator[Path]:
        assert self.folder is not None
        for rank in self.lower:
            for suffix in ("", ".1"):  # the file before, where it was rotated just now
                yield self.folder / f"rank{rank}.log{suffix}"


def read(path: Path, since: float) -> Iterator[Same]:
    """The first lines of what a log file's end holds since a moment, in either format."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return
    after = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            if match[1] >= after:
                yield match[2], match[3], match[4]
        elif line.startswith("{"):
            try:
                entry = json.loads(line)
                if entry["time"] >= since:
                    message = entry["message"].splitlines() or [""]
                    yield entry["level"], entry["logger"], message[0]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
