"""The thread that hands what is recorded to the sinks, so that no file and no terminal slows the
training.

Everything waits in one buffer until every sink has it, in the order in which it was recorded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.telemetry.media import Media
from launcher.telemetry.sinks import Record, Sink

logger = logging.getLogger(__name__)
# What may wait in memory: at 20 values a record that is 60,000 of them. Media take a part of it.
LIMIT, MEDIA_PART = 256 << 20, 0.25
RECORD_BYTES = 4096  # about what a record takes in memory
TOGETHER = 64  # most items of one write: each try to write to a full disk costs no more
BEAT_S = 1.0
# How long the thread lets things come together: each time it wakes, it takes the interpreter from
# the training for a moment.
LINGER_S = 0.05


@dataclass
class _Reader:
    """How far a sink is, and what was told of it."""

    sink: Sink
    at: int = 0  # the first item of the buffer that it has not got
    failed: bool = False
    recovered: bool = False


class Writer:
    """Made on every rank, opened on rank 0 alone. Before `open`, and where it is never opened,
    nothing is kept and nothing done; after `close` likewise.

    A sink that cannot be written is tried again with what comes next, and at least once a second;
    meanwhile things wait. Beyond the limit media are left out, then records lost: after that
    `flush` is never True again, for a checkpoint must not follow records that are not in the files.
    """

    def __init__(self, limit: int = LIMIT, flush_s: float = 60.0, close_s: float = 20.0) -> None:
        """`limit` is in bytes; `flush_s` and `close_s` are how long a checkpoint and the end of a
        run wait for a sink that is stuck."""
        self.limit, self.flush_s, self.close_s = limit, flush_s, close_s
        self.is_open = False
        self.left_out = self.lost = 0  # media, records
        self._thread: threading.Thread | None = None
        self._finished = False
        # The lock of what follows, which both threads change.
        self._changed = threading.Condition()
        self._new: list[Record | Media] = []  # on their way into the buffer
        self._bytes = 0  # of these and of the buffer
        self._asked = self._answered = 0  # flushes
        self._flushed = True  # what the last answer was

    def open(
        self,
        sinks: Sequence[Sink],
        history: Callable[..., bool],
        complete: Callable[[], Mapping[str, float]] = dict,
        beat: Callable[[], Any] = lambda: None,
    ) -> None:
        """Start the thread. In it `history(event, step, **details)` writes history.jsonl and says
        whether it could; `complete()` gives figures for the records that tell of speed; `beat()` is
        called about once a second, for files that are written or looked for without a record."""
        self._buffer: list[Record | Media] = []
        self._readers = [_Reader(sink) for sink in sinks]
        self._history, self._complete, self._beat = history, complete, beat
        self._untold: list[dict[str, Any]] = []  # for the history
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self.is_open = True
        self._thread.start()

    def write(self, record: Record) -> None:
        """Have a record written."""
        if self.is_open and not self._put(record, self.limit):
            self.lost += 1

    def show(self, media: Media) -> None:
        """Have media shown."""
        if self.is_open and not self._put(media, MEDIA_PART * self.limit):
            self.left_out += 1
            if self.left_out == 1:
                told = "pictures, histograms and texts are left out: %d MiB wait to be written"
                logger.warning(told, self._bytes >> 20)

    def finish(self) -> None:
        """Say that the run is complete."""
        self._finished = True

    def flush(self) -> bool:
        """Whether all that was recorded is in the files that must have it. The thread is idle then
        until something is recorded, so the files' lengths stay."""
        if not self.is_open:
            return self._thread is None
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            answered = self._changed.wait_for(lambda: not self._urgent(), self.flush_s)
            return answered and self._flushed and not self.lost

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if not self.is_open or self._thread is None:
            return
        with self._changed:
            self.is_open = False
            self._changed.notify_all()
        self._thread.join(self.close_s)
        if self._thread.is_alive():
            logger.warning("a sink is stuck: what waits for it is not written")
        if self.left_out:
            logger.warning("%d pictures, histograms and texts were left out", self.left_out)

    def _put(self, item: Record | Media, limit: float) -> bool:
        with self._changed:
            if self._bytes + _size(item) > limit:
                return False
            self._bytes += _size(item)
            self._new.append(item)
            if len(self._new) == 1:
                self._changed.notify_all()
            return True

    def _urgent(self) -> bool:
        return self._asked != self._answered or not self.is_open

    # In the thread.

    def _run(self) -> None:
        last, beaten = False, time.monotonic()
        while not last:
            with self._changed:
                if self._changed.wait_for(lambda: self._new or self._urgent(), BEAT_S):
                    self._changed.wait_for(self._urgent, LINGER_S)
                new, self._new = self._new, []
                asked, last = self._asked, not self.is_open
            self._buffer += map(self._completed, new)
            for reader in self._readers:
                self._bring(reader)
            readers = [reader for reader in self._readers if reader.sink.essential]
            flushed = all(reader.at == len(self._buffer) for reader in readers)
            with self._changed:
                self._bytes -= self._forget()
                self._answered, self._flushed = asked, flushed
                self._changed.notify_all()
            # The history may be on the same full disk: it is told when it can be.
            while self._untold and self._history("sink", **self._untold[0]):
                del self._untold[0]
            if time.monotonic() - beaten >= BEAT_S:
                beaten = time.monotonic()
                self._try(self._beat)
        for reader in self._readers:
            try:
                reader.sink.close(self._finished)
            except Exception as error:
                self._fail(reader, error, 0)

    def _completed(self, item: Record | Media) -> Record | Media:
        if isinstance(item, Media) or "perf/step_s" not in item:
            return item
        return {**item, **(self._try(self._complete) or {})}

    def _try(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception:
            logger.debug("in the writing thread", exc_info=True)

    def _bring(self, reader: _Reader) -> None:
        """Write what a sink has not got, up to what fails."""
        while items := self._buffer[reader.at : reader.at + TOGETHER]:
            try:
                reader.sink.write(items)
                self._recover(reader, _step(items[0]))
            except OSError as error:
                return self._fail(reader, error, _step(items[0]))
            except Exception as error:  # a bug, which would come again with the same items
                self._fail(reader, error, _step(items[0]))
                self.lost += reader.sink.essential
            reader.at += len(items)

    def _fail(self, reader: _Reader, error: Exception, step: int) -> None:
        if not reader.failed:
            reader.failed, reason = True, f"{type(error).__name__}: {error}"
            reader.recovered = not isinstance(error, OSError)  # what had a bug goes on at once
            then = "goes on with the next" if reader.recovered else "is tried again"
            told = "%s cannot be written: %s. Training goes on; it %s"
            logger.warning(told, reader.sink.name, reason, then)
            self._untold.append({"step": step, "sink": reader.sink.name, "failed": reason})

    def _recover(self, reader: _Reader, step: int) -> None:
        if reader.failed and not reader.recovered:
            reader.recovered = True
            logger.info("%s is written again", reader.sink.name)
            self._untold.append({"step": step, "sink": reader.sink.name, "recovered": True})

    def _forget(self) -> int:
        """Drop what no sink waits for any more; its bytes. Where half of the limit is used, nothing
        waits for a sink that no checkpoint needs."""
        full = self._bytes > self.limit / 2
        places = [r.at for r in self._readers if r.sink.essential or not full]
        done = min(places, default=len(self._buffer))
        freed = sum(map(_size, self._buffer[:done]))
        del self._buffer[:done]
        for reader in self._readers:
            reader.at = max(reader.at - done, 0)
        return freed


def _size(item: Record | Media) -> int:
    return RECORD_BYTES + (item.nbytes if isinstance(item, Media) else 0)


def _step(item: Record | Media) -> int:
    return item.step if isinstance(item, Media) else item["step"]
