"""What a rank watches beside its work, in a thread of its own: stop requests, and whether the work
goes on.

The thread waits for no collective, no file and no lock of the loop's. Signals reach it through a
file descriptor (signal.set_wakeup_fd), so also while the main thread waits inside a collective,
where Python's own handlers do not run. Where even this thread cannot run, because native code holds
Python's lock (the GIL), faulthandler's timer, which needs no lock, writes the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import psutil

from launcher.runtime import hang
from launcher.runtime.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TICK_S = 0.5
# Signals within this time of the first are the same request: torchrun forwards to every rank what
# a scheduler sends to everyone (10 ms apart, measured).
SAME_REQUEST_S = 5.0
# Before a run's ranks know each other, joining raises after the same time, with better words.
GRACE_S = 10.0
# How much later than this thread would have noticed faulthandler's timer goes off.
STACKS_S = 1.5
# How long an ending rank may take for its last words.
LAST_WORDS_S = 30.0
STOPPED = 75  # sysexits.h's EX_TEMPFAIL: stopped early on purpose, and resumable


class Watch:
    """The loop says what it is at with `enter`; the thread measures how long nothing moved.

    `stop` is why this rank was asked to stop, or None. `on_tick` and `on_stall` are called in the
    thread: each tick, and each tick in which nothing has moved for longer than `limit` seconds.
    `on_alone` is called by `enter`, where a phase begins or ends that may take long on one rank.
    """

    def __init__(
        self, topology: Topology | None = None, limits: Mapping[str, float] | None = None
    ) -> None:
        """`limits` are seconds for each phase; "start" holds until the first step is done."""
        self.topology = topology or Topology()
        self.limits = limits or {}
        self.phase, self.moves = "start", 0
        self.joined = self.started = False  # the process group; an attempt's first step
        self.age = 0.0  # seconds since something moved
        self.stop: str | None = None
        self.stacks: IO[Any] | None = None  # an open file for faulthandler's timer
        self.on_tick: Callable[[], None] | None = None
        self.on_stall: Callable[[], None] | None = None
        self.on_alone: Callable[[], None] | None = None
        self._ending = threading.Lock()
        self._stopped_at = 0.0
        self._closed = threading.Event()
        self._parent = os.getppid()

    def enter(self, phase: str) -> None:
        """Say what comes next; this is progress. Cheap enough for every step."""
        told = phase != self.phase and (phase in hang.ALONE or self.phase in hang.ALONE)
        self.phase = phase
        self.moves += 1
        if told and self.on_alone is not None:
            self.on_alone()

    @property
    def limit(self) -> float:
        """Seconds that the phase at hand may take without a move."""
        phase = self.phase if self.started or self.phase == "end" else "start"
        return self.limits.get(phase, float("inf"))

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop after a step they agree on; the first reason counts."""
        if self.stop is None and self.phase != "end":
            self.stop = reason
            if self.topology.is_main:
                _say(f"{reason}: stopping after this step, with a checkpoint")

    def begin_end(self) -> bool:
        """Whether the caller is the first to end this rank for a failure, and so tells of it."""
        first = self._ending.acquire(blocking=False)
        if first:
            self.enter("end")
        return first

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Take the signals over and run the thread; both end with the context."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Signals must have some handler of Python's for the descriptor to be written to.
        before = {number: signal.signal(number, _noted) for number in SIGNALS}
        old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._run, args=(reader,), name="watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            os.write(writer, b"\0")
            thread.join(2 * TICK_S)
            faulthandler.cancel_dump_traceback_later()
            if self.stacks is not None:
                self.stacks.close()
            signal.set_wakeup_fd(old_writer)
            for number, handler in before.items():
                signal.signal(number, handler)
            if not thread.is_alive():
                os.close(reader)
                os.close(writer)

    def _run(self, reader: int) -> None:
        seen, last = self.moves, time.monotonic()
        while not self._closed.is_set():
            if select.select([reader], [], [], TICK_S)[0]:
                for number in os.read(reader, 4096):
                    self._signalled(number)
            now = time.monotonic()
            # A process that was frozen (SIGSTOP, a suspended machine) has not watched meanwhile.
            elapsed, last = min(now - last, 2 * TICK_S), now
            if self.moves != seen:
                seen, self.age = self.moves, 0.0
            else:
                self.age += elapsed
            if self.on_tick is not None:
                self.on_tick()
            if self.age > self.limit and not self._closed.is_set():
                faulthandler.cancel_dump_traceback_later()  # the stacks are told below
                self._stalled()
            elif self.stacks is not None:
                # Armed again each tick (53 microseconds). It ends nothing: a process that was
                # frozen by its scheduler finds its time over when it wakes.
                left = self.limits["step" if self.started else "start"] + STACKS_S
                faulthandler.dump_traceback_later(left, file=self.stacks)

    def _signalled(self, number: int) -> None:
        if number not in SIGNALS:
            return
        if self._stopped_at:
            if time.monotonic() - self._stopped_at > SAME_REQUEST_S:
                _say(f"{signal.Signals(number).name} again: leaving at once")
                leave(1)
            return
        self._stopped_at = time.monotonic()
        reason = signal.Signals(number).name
        if self.topology.launched_by == "torchrun":
            # The kernel tells of a parent's death when its first thread is gone, a moment before
            # the parent is another.
            time.sleep(0.2)
        if os.getppid() != self._parent:
            reason = f"{self.topology.launched_by} died"
        if not self.started and not (self.joined and self.topology.distributed):
            # Nothing is done yet that could be saved, and no other rank waits for this one.
            _say(f"{reason}: stopped before the first step")
            leave(STOPPED)
        self.request_stop(reason)

    def _stalled(self) -> None:
        if self.phase == "end":
            _say(f"could not end within {LAST_WORDS_S:g} s: leaving")
            leave(1)
        elif self.on_stall is not None:
            self.on_stall()
        elif self.age > self.limit + GRACE_S:
            _say(f"{self.topology}: nothing has moved for {self.age:.0f} s. {hang.stacks()}")
            leave(1)


def _noted(number: int, frame: Any) -> None:
    """The thread acts on it."""


def _say(line: str) -> None:
    # Not through logging: the main thread may hold one of its locks for good.
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"launcher: {line}\n".encode())


def leave(code: int) -> None:
    """End this process now, whatever its main thread is at, and its loader workers with it."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os._exit(code)
