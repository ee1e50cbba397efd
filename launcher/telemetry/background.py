"""Records are handed to the sinks in a thread of its own, so that no file and no terminal slows
the training.

One thread, one queue: what is recorded reaches every sink in the order it was recorded. A forked
loader worker has neither.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from launcher.telemetry.media import Media
from launcher.telemetry.recorder import Record, Sink

logger = logging.getLogger(__name__)
# What may wait in memory for a sink that is stuck: pictures and the like up to the first, records
# up to the second. At 20 values a record that is 60,000 of them.
MEDIA_LIMIT, RECORD_LIMIT = 64 << 20, 256 << 20
RECORD_BYTES = 4096  # about what a record takes in memory
# How long the thread lets things come together: each time it wakes, it takes the interpreter from
# the training for a moment.
LINGER_S = 0.05
# How long a checkpoint waits for the files, and the end of a run for a sink that is stuck.
FLUSH_S, CLOSE_S = 60.0, 20.0
# A sink is told of as slow when its writes took so much longer, in all, than the first of these
# each; quicker ones in between count against it.
QUICK_S, SLOW_S = 0.02, 0.5

History = Callable[..., bool]


class Background(Sink):
    """A sink that passes on to others in a thread.

    A sink that fails, or is slow, is reported once, on the console and in history.jsonl; one that
    fails is tried again with every later record. Where it is stuck, records wait in memory;
    pictures, histograms and texts are left out beyond MEDIA_LIMIT, records beyond RECORD_LIMIT.
    After a lost record `flush` never answers True again: a checkpoint must not follow records that
    are not in the files.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        history: History,
        figures: Callable[[], Mapping[str, float]] = dict,
        media_limit: int = MEDIA_LIMIT,
        record_limit: int = RECORD_LIMIT,
    ) -> None:
        """`history(event, step, **details)` writes history.jsonl and says whether it could;
        `figures` are read in the thread, for the records that tell of speed."""
        self.history, self.figures = history, figures
        self.guarded = [_Guarded(sink, self._report) for sink in sinks]
        self.media_limit, self.record_limit = media_limit, record_limit
        self.pid = os.getpid()
        # What to call with what, and its bytes; a Future for `flush`; None at the end.
        self.queue: queue.SimpleQueue[tuple[str, Any, int] | Future[bool] | None]
        self.queue = queue.SimpleQueue()
        self.urgent = threading.Event()
        self.taken = self.done = 0  # bytes, each counted by one thread alone
        self.left_out = self.lost = 0  # media, records
        self.step = 0  # of the newest thing handed on
        self.untold: deque[dict[str, Any]] = deque()  # for the history
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="records", daemon=True)
        self.thread.start()

    def write(self, record: Record) -> None:
        if not self._put("write", record, RECORD_BYTES, self.record_limit):
            self.lost += 1

    def show(self, media: Media) -> None:
        if not self._put("show", media, media.nbytes + RECORD_BYTES, self.media_limit):
            self.left_out += 1
            if self.left_out == 1:
                logger.warning(
                    "pictures, histograms and texts are left out: %d MiB wait to be written",
                    self.media_limit >> 20,
                )

    def finish(self) -> None:
        self._put("finish", None, 0, self.record_limit)

    def flush(self) -> bool:
        """Whether all that was recorded is in the files that must have it. The thread is idle then
        until something is recorded, so the files' lengths stay."""
        if self.closed or os.getpid() != self.pid:
            return False
        flushed: Future[bool] = Future()
        self.queue.put(flushed)
        self.urgent.set()
        wait([flushed], FLUSH_S)
        return flushed.done() and flushed.result() and not self.lost

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.queue.put(None)
        self.urgent.set()
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            logger.warning("a sink is stuck: what waits for it is not written")
        if self.left_out:
            logger.warning("%d pictures, histograms and texts were left out", self.left_out)

    def _put(self, method: str, item: Any, nbytes: int, limit: int) -> bool:
        if self.closed or os.getpid() != self.pid:
            return True
        if self.taken - self.done + nbytes > limit:
            return False
        self.taken += nbytes
        self.queue.put((method, item, nbytes))
        return True

    def _run(self) -> None:
        last = False
        while not last:
            batch = [self.queue.get()]
            self.urgent.wait(LINGER_S)
            self.urgent.clear()
            while not self.queue.empty():
                batch.append(self.queue.get())
            last = None in batch
            calls = [self._complete(*item) for item in batch if isinstance(item, tuple)]
            # One write for all that came meanwhile: a slow file does not fall behind.
            taken = [guarded.take(calls, last) for guarded in self.guarded]
            # The history may be on the same full disk: it is told when it can be.
            while self.untold and self.history("sink", **self.untold[0]):
                self.untold.popleft()
            self.done += sum(item[2] for item in batch if isinstance(item, tuple))
            for item in batch:
                if isinstance(item, Future):
                    item.set_result(all(taken))

    def _complete(self, method: str, item: Any, nbytes: int) -> tuple[str, Any]:
        if isinstance(item, Media):
            self.step = item.step
        elif item is not None:
            self.step = item["step"]
            if "perf/step_s" in item:
                try:
                    item = {**item, **self.figures()}
                except Exception:
                    logger.debug("no system figures", exc_info=True)
        return method, item

    def _report(self, sink: Sink, what: str, **details: Any) -> None:
        logger.warning("%s %s", sink.name, what)
        self.untold.append({"step": self.step, "sink": sink.name, **details})


class _Guarded:
    """A sink whose errors and delays are reported once each, and end nothing."""

    def __init__(self, sink: Sink, report: Callable[..., None]) -> None:
        self.sink, self.report = sink, report
        self.failed = self.waits = self.slow = False  # `waits`: what failed is tried again
        self.late = 0.0

    def take(self, calls: Sequence[tuple[str, Any]], last: bool) -> bool:
        """Call the sink's methods, and flush it. False where a checkpoint must not follow."""
        for method, item in calls:
            self._try(method, *([] if item is None else [item]))
        began = time.monotonic()
        flushed = self._try("flush")
        self._time(time.monotonic() - began)
        if last:
            self._try("close")
        return flushed or not self.sink.essential

    def _try(self, method: str, *arguments: Any) -> bool:
        try:
            getattr(self.sink, method)(*arguments)
        except Exception as error:
            self.waits = isinstance(error, OSError)
            if not self.failed:
                self.failed, reason = True, f"{type(error).__name__}: {error}"
                then = "is tried again" if self.waits else "goes on with the next record"
                what = f"cannot be written: {reason}. Training goes on; it {then}"
                self.report(self.sink, what, failed=reason)
            return False
        if self.waits and method == "flush":
            self.waits = False
            logger.info("%s is written again", self.sink.name)
        return True

    def _time(self, seconds: float) -> None:
        self.late = max(self.late + seconds - QUICK_S, 0.0)
        if self.late > SLOW_S and not self.slow:
            self.slow = True
            what = f"is slow: {seconds:.2f} s a write. Training does not wait; checkpoints do"
            self.report(self.sink, what, slow_s=seconds)
