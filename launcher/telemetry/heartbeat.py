"""Rank 0's sign of life, and the requests to stop that only it sees: the file STOP, and time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

from launcher.runtime.progress import Progress
from launcher.telemetry.rundir import RunDirectory

LOOK_S = 1.0
BEAT_S = 10.0


class Heartbeat:
    """A thread that keeps status.json fresh, and asks to stop when it is time.

    It waits for files, which may stand on a stalled mount: nobody waits for it.
    """

    def __init__(
        self,
        directory: RunDirectory,
        progress: Progress,
        deadlines: Mapping[str, float],
        margin_s: Callable[[], float],
        request_stop: Callable[[str], None],
    ) -> None:
        """`deadlines` are moments of time.monotonic() by what sets them; `margin_s` is how long
        before one the stop must begin."""
        self.directory, self.progress = directory, progress
        self.deadlines, self.margin_s, self.request_stop = deadlines, margin_s, request_stop
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self.closed.wait(LOOK_S):
            with contextlib.suppress(OSError):
                if self.directory.stop.exists():
                    self.request_stop("file STOP")
            for what, deadline in self.deadlines.items():
                if time.monotonic() + self.margin_s() >= deadline:
                    self.request_stop(what)
            if time.monotonic() - beaten >= BEAT_S:
                beaten = time.monotonic()
                self.directory.heartbeat(self.progress.as_dict())

    def close(self) -> None:
        self.closed.set()
        self.thread.join(2 * LOOK_S)
