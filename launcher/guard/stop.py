"""Requests to stop: signals, times that are over, and how early a stop must begin to be in time.
Imports no torch: a signal may come while that is being imported."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import psutil

from launcher.config import CfgNode, parse_duration
from launcher.runtime.progress import Progress

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Signals within this time of the first are the same request: torchrun forwards to every rank what
# a scheduler sends to everyone (10 ms apart, measured).
SAME_REQUEST_S = 5.0
STOPPED = 75  # sysexits.h's EX_TEMPFAIL: stopped early on purpose, and resumable
# Slurm kills at the very second of its limit; the job file still has something to do before.
SLURM_SPARE_S = 30.0
# On CUDA what the ranks agree on (engine/agreement.py) is read this many steps later, when its copy
# to the host is long done: reading it at once would make the host wait for the device in each step.
LAG = 8


@contextmanager
def leaving_at_signals() -> Iterator[None]:
    """Let a signal end this process as one that was stopped and may be started again, as long as no
    Guard has taken the signals over. Its exit code tells, and nothing is made yet."""

    def leave_now(number: int, frame: FrameType | None) -> None:
        say(f"{signal.Signals(number).name}: stopped before the first step")
        leave(STOPPED)

    before = {number: signal.signal(number, leave_now) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """The signals that ask to stop, for a thread to wait for: a file descriptor tells of them
    (signal.set_wakeup_fd), so also while the main thread waits inside a collective, where Python's
    own handlers do not run. Made and closed in the main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # Signals must have some handler of Python's for the descriptor to be written to.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}

    def wait(self, seconds: float) -> list[int]:
        """The signals that come within so long; returns at the first, or when woken."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return []
        return [number for number in os.read(self._reader, 4096) if number in SIGNALS]

    def wake(self) -> None:
        """Let `wait` return at once."""
        with contextlib.suppress(OSError):  # full, so it returns anyway; or closed
            os.write(self._writer, b"\0")

    def close(self) -> None:
        """Put the handlers back that were there before."""
        signal.set_wakeup_fd(self._old_writer)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)
        os.close(self._reader)
        self._writer = self._reader = -1


class StopMargin:
    """How long a stop takes, in seconds: the ranks agree a step later, on CUDA some more, and the
    last checkpoint has to be written."""

    def __init__(
        self,
        progress: Progress,
        cuda: bool = False,
        granted_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`granted_s` is how long after the request a rank is killed, None where it is not."""
        self.progress, self.granted_s, self.monotonic = progress, granted_s, monotonic
        self.began, self.first = monotonic(), progress.step
        self.steps = 2 + (LAG if cuda else 0)
        self.longest_save_s = 0.0

    def __call__(self) -> float:
        steps = self.progress.step - self.first
        per_step = (self.monotonic() - self.began) / max(1, steps)
        return self.longest_save_s + self.steps * per_step

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took."""
        self.longest_save_s = max(self.longest_save_s, seconds)
        if self.granted_s is not None and (needed := self()) > self.granted_s:
            logger.warning(
                "A stop takes about %.0f s (a save took %.1f s), but torchrun kills its ranks %g s "
                "after it was told to stop, and the steps since the last checkpoint would be lost. "
                "Start it with --shutdown-timeout=%.0f or more (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).",
                *(needed, seconds, self.granted_s, 2 * needed),
            )
            self.granted_s = None  # once is enough


def deadlines(cfg: CfgNode) -> dict[str, float]:
    """Seconds from now until this attempt must have stopped, by what sets them: TRAIN.MAX_TIME
    after the process began, and the end of Slurm's time limit."""
    found = {}
    if (most := parse_duration(cfg.TRAIN.MAX_TIME)) is not None:
        age = time.time() - psutil.Process().create_time()
        found[f"TRAIN.MAX_TIME {cfg.TRAIN.MAX_TIME}"] = most.amount - age
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        found["Slurm's time limit"] = int(end) - time.time() - SLURM_SPARE_S
    return found


def shutdown_timeout(env: Mapping[str, str]) -> float:
    """Seconds that torchrun gives its ranks between SIGTERM and SIGKILL.

    https://docs.pytorch.org/docs/stable/elastic/run.html; a torch without the setting gives 30.
    """
    command = ""
    with contextlib.suppress(psutil.Error):
        command = " ".join(psutil.Process(os.getppid()).cmdline())
    found = re.search(r"--shutdown[-_]timeout[= ](\d+)", command)
    text = found[1] if found else env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    return float(text) if text.isdigit() else 30.0


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
