"""Records are handed to the sinks in a thread of its own, so that no file and no terminal slows
the training.

One thread, one queue: what is recorded reaches every sink in the order it was recorded. A forked
loader worker has neither, and needs none of their locks.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
FLUSH_S, CLOSE_S = 60.0, 60.0

History = Callable[..., bool]


class Figures(Protocol):
    """Figures that are read in the thread, and stand in the records that tell of speed."""

    def latest(self) -> Mapping[str, float]: ...


@dataclass
class _Flush:
    done: threading.Event = field(default_factory=threading.Event)
    complete: bool = False
    last: bool = False  # the thread ends with it


class Background:
    """A sink that passes on to others in a thread.

    A sink that fails is reported once, on the console and in history.jsonl, and is tried again
    with every later record. Where it is stuck, records wait in memory; pictures, histograms and
    texts are left out beyond MEDIA_LIMIT, records beyond RECORD_LIMIT. After a lost record `flush`
    never answers True again: a checkpoint must not follow records that are not in the files.
    """

    name, essential = "the records", True

    def __init__(
        self,
        sinks: Sequence[Sink],
        history: History,
        figures: Figures | None = None,
        media_limit: int = MEDIA_LIMIT,
        record_limit: int = RECORD_LIMIT,
    ) -> None:
        """`history(event, step, **details)` writes history.jsonl and says whether it could."""
        self.sinks, self.history, self.figures = list(sinks), history, figures
        self.media_limit, self.record_limit = media_limit, record_limit
        self.pid = os.getpid()
        self.wake, self.urgent = threading.Condition(), threading.Event()
        self.queue: deque[tuple[Any, int]] = deque()
        self.bytes = 0  # in the queue and in the thread's hands
        self.left_out = self.lost = 0  # media, records
        self.step = 0  # of the newest thing handed on
        self.failed: dict[int, bool] = {}  # sinks that were told of: whether what waits is retried
        self.untold: deque[dict[str, Any]] = deque()  # for the history
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="records", daemon=True)
        self.thread.start()

    def write(self, record: Record) -> None:
        if not self._put(record, RECORD_BYTES, self.record_limit):
            self.lost += 1

    def show(self, media: Media) -> None:
        if not self._put(media, media.nbytes + RECORD_BYTES, self.media_limit):
            self.left_out += 1
            if self.left_out == 1:
                logger.warning(
                    "pictures, histograms and texts are left out: %d MiB wait to be written",
                    self.media_limit >> 20,
                )

    def finish(self) -> None:
        self._put("finish", 0, self.record_limit)

    def flush(self) -> bool:
        """Whether all that was recorded is in the files that must have it. The thread is idle then
        until something is recorded, so the files' lengths stay."""
        return self._wait(_Flush(), FLUSH_S)

    def close(self) -> None:
        if self.closed:
            return
        if not self._wait(_Flush(last=True), CLOSE_S) and self.thread.is_alive():
            logger.warning("a sink is stuck: what waits for it is not written")
        self.closed = True
        if self.left_out:
            logger.warning("%d pictures, histograms and texts were left out", self.left_out)

    def _put(self, item: Any, nbytes: int, limit: int) -> bool:
        if self.closed or os.getpid() != self.pid:
            return True
        with self.wake:
            if self.bytes + nbytes > limit:
                return False
            self.bytes += nbytes
            self.queue.append((item, nbytes))
            self.wake.notify()
        return True

    def _wait(self, flush: _Flush, seconds: float) -> bool:
        if self.closed or os.getpid() != self.pid:
            return False
        with self.wake:
            self.queue.append((flush, 0))
            self.wake.notify()
        self.urgent.set()
        return flush.done.wait(seconds) and flush.complete and not self.lost

    def _run(self) -> None:
        while True:
            with self.wake:
                while not self.queue:
                    self.wake.wait()
            self.urgent.wait(LINGER_S)
            self.urgent.clear()
            with self.wake:
                batch, self.queue = self.queue, deque()
            flushes = [item for item, _ in batch if isinstance(item, _Flush)]
            for item, _ in batch:
                if not isinstance(item, _Flush):
                    self._hand_on(item)
            # One write for all that came meanwhile: a slow file does not fall behind.
            complete = [self._try(sink, sink.flush) for sink in self.sinks]
            last = any(flush.last for flush in flushes)
            if last:
                for sink in self.sinks:
                    self._try(sink, sink.close)
            self._tell()
            with self.wake:
                self.bytes -= sum(nbytes for _, nbytes in batch)
            for flush in flushes:
                flush.complete = all(complete)
                flush.done.set()
            if last:
                return

    def _hand_on(self, item: Any) -> None:
        if isinstance(item, Media):
            self.step = item.step
            for sink in self.sinks:
                self._try(sink, sink.show, item)
            return
        if item == "finish":
            for sink in self.sinks:
                self._try(sink, sink.finish)
            return
        self.step = item["step"]
        if self.figures is not None and "perf/step_s" in item:
            try:
                item = {**item, **self.figures.latest()}
            except Exception:
                logger.debug("no system figures", exc_info=True)
        for sink in self.sinks:
            self._try(sink, sink.write, item)

    def _try(self, sink: Sink, call: Callable[..., Any], *arguments: Any) -> bool:
        """Call it; an error is told once a sink. False where a checkpoint must not follow."""
        try:
            call(*arguments)
        except Exception as error:
            if id(sink) not in self.failed:
                self._report(sink, error)
            self.failed[id(sink)] = isinstance(error, OSError)
            return not sink.essential
        if self.failed.get(id(sink)) and call == sink.flush:
            self.failed[id(sink)] = False
            logger.info("%s is written again", sink.name)
        return True

    def _report(self, sink: Sink, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        what = "is tried again" if isinstance(error, OSError) else "goes on with the next record"
        logger.warning("%s cannot be written: %s. Training goes on; it %s", sink.name, reason, what)
        self.untold.append({"step": self.step, "sink": sink.name, "failed": reason})

    def _tell(self) -> None:
        # The history may be on the same full disk: it is told when it can be.
        while self.untold and self.history("sink", **self.untold[0]):
            self.untold.popleft()
