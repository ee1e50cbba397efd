"""Requests to stop: signals, and times that are over; how early a stop must begin. Imports no
torch: a signal may come while that is being imported."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import Any

import psutil

from launcher.config import CfgNode, seconds
from launcher.runtime.progress import Progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Within this time they are one request: torchrun forwards what a scheduler sends to everyone.
SAME_REQUEST_S = 5.0
STOPPED = 75  # sysexits.h's EX_TEMPFAIL: stopped early on purpose, and resumable
# Slurm kills at the very second of its limit; the job file still has something to do before.
SLURM_SPARE_S = 30.0
# On CUDA what the ranks agree on (engine/agreement.py) is read this many steps later, when its copy
# to the host is long done: reading it at once would make the host wait for the device in each step.
LAG = 8


class Signals:
    """The signals that ask to stop, as a context in the main thread, for another to wait for.

    A file descriptor tells of them (signal.set_wakeup_fd), so also while the main thread waits in a
    collective, where Python's own handlers do not run. As long as nobody has waited for them, one
    ends this process as stopped and to be started again: nothing is made yet.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self.awaited = False

    def __enter__(self) -> Signals:
        self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_writer)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def _handle(self, number: int, frame: object) -> None:
        if not self.awaited:
            say(f"{signal.Signals(number).name}: stopped before the first step")
            leave(STOPPED)

    def wait(self, seconds: float) -> list[int]:
        """The signals that come within so long; returns at the first, or when woken."""
        self.awaited = True
        if not select.select([self._reader], [], [], seconds)[0]:
            return []
        return [number for number in os.read(self._reader, 4096) if number in SIGNALS]

    def wake(self) -> None:
        """Let `wait` return at once."""
        with contextlib.suppress(OSError):  # full, so it returns anyway
            os.write(self._writer, b"\0")


class StopMargin:
    """How long a stop takes, in seconds: the ranks agree a step later, on CUDA some more, and the
    last checkpoint has to be written."""

    def __init__(self, progress: Progress, device: str, clock: Any) -> None:
        self.progress, self.clock = progress, clock
        self.began, self.first = clock.monotonic(), progress.step
        self.steps = 2 + (LAG if device == "cuda" else 0)
        self.longest_save_s = 0.0

    def __call__(self) -> float:
        steps = max(1, self.progress.step - self.first)
        per_step = (self.clock.monotonic() - self.began) / steps
        return self.longest_save_s + self.steps * per_step


def deadlines(cfg: CfgNode, now: float) -> dict[str, float]:
    """When this attempt must have stopped, by a clock at `now`, and what says so: TRAIN.MAX_TIME
    after the process began, and the end of Slurm's time limit."""
    found = {}
    if cfg.TRAIN.MAX_TIME:
        age = time.time() - psutil.Process().create_time()
        found[f"TRAIN.MAX_TIME {cfg.TRAIN.MAX_TIME}"] = now - age + seconds(cfg.TRAIN.MAX_TIME)
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        found["Slurm's time limit"] = now + int(end) - time.time() - SLURM_SPARE_S
    return found


def say(line: str) -> None:
    """Print a line on stderr. Not through logging: the main thread may hold one of its locks for
    good."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"launcher: {line}\n".encode())


def leave(code: int) -> None:
    """End this process now, whatever its main thread is at, and its loader workers with it."""
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os._exit(code)
