"""The thread that hands what is recorded to the sinks, so that no file and no terminal slows the
training. Everything waits in one buffer, in the order it was recorded, until every sink has it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.log import get_logger
from launcher.telemetry.media import Media
from launcher.telemetry.sinks import Record, Sink

logger = get_logger(__name__)
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
    again: float = 0.0  # when it is tried, after a failure
    told: str = ""  # "failed", then "recovered"


class Writer:
    """Made on every rank, and opened on rank 0: before `open` and after `close` nothing is taken.

    A sink that cannot be written is tried again once a second, and for a checkpoint.
    Beyond the limit media are left out, then records lost: after that `flush` is never True again,
    for a checkpoint must not follow records that are not in the files.
    """

    def __init__(self, limit: int = LIMIT, flush_s: float = 60.0, close_s: float = 20.0) -> None:
        """`limit` is in bytes; `flush_s` and `close_s` are how long a checkpoint and the end of a
        run wait for a sink that is stuck."""
        self.limit, self.flush_s, self.close_s = limit, flush_s, close_s
        self.is_open = self._completed = False
        self.left_out = self.lost = 0  # media, records
        self._buffer: list[Record | Media] = []  # the thread's
        self._untold: list[dict[str, Any]] = []  # likewise, for the history
        # The lock of what follows, which both threads change.
        self._changed = threading.Condition()
        self._new: list[Record | Media] = []  # on their way into the buffer
        self._bytes = 0  # of both
        self._asked = self._answered = 0  # flushes
        self._flushed = True  # the last answer; that of a writer that is not opened

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
        self._readers = [_Reader(sink) for sink in sinks]
        self._history, self._complete, self._beat = history, complete, beat
        self.is_open = True
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
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
                logger.warning("pictures, histograms and texts are left out: too much waits")

    def flush(self) -> bool:
        """Whether all that was recorded is in the files that must have it. The thread is idle then
        until something is recorded, so the files' lengths stay."""
        with self._changed:
            if self.is_open:
                self._asked += 1
                self._changed.notify_all()
            answered = self._changed.wait_for(lambda: self._asked == self._answered, self.flush_s)
            return answered and self._flushed and not self.lost

    def close(self, completed: bool = False) -> None:
        """Write what waits, and end the thread; `completed`: so is the run."""
        if not self.is_open:
            return
        with self._changed:
            self.is_open, self._completed = False, completed
            self._changed.notify_all()
        self._thread.join(self.close_s)
        if self._thread.is_alive():
            self._flushed = False
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

    # In the thread.

    def _run(self) -> None:
        beaten = time.monotonic()
        while self.is_open:
            with self._changed:
                if self._changed.wait_for(lambda: self._new or self._urgent(), BEAT_S):
                    self._changed.wait_for(self._urgent, LINGER_S)
            self._pass()
            if time.monotonic() - beaten >= BEAT_S:
                beaten = time.monotonic()
                with contextlib.suppress(Exception):
                    self._beat()
        self._pass()  # what came while the last one was under way
        for reader in self._readers:
            try:
                reader.sink.close(self._completed)
            except Exception as error:
                logger.warning("%s was not ended: %s", reader.sink.name, error)

    def _urgent(self) -> bool:
        return self._asked != self._answered or not self.is_open

    def _pass(self) -> None:
        """Bring every sink what it has not got."""
        with self._changed:
            new, self._new, asked = self._new, [], self._asked
        for item in new:
            if isinstance(item, dict) and "perf/step_s" in item:
                with contextlib.suppress(Exception):  # no figures then
                    item.update(self._complete())
        self._buffer += new
        urgent = self._urgent()
        for reader in self._readers:
            while items := self._buffer[reader.at : reader.at + TOGETHER]:
                if not (urgent or time.monotonic() >= reader.again):
                    break
                if not self._write(reader, items):
                    reader.again = time.monotonic() + BEAT_S
                    break
                reader.at += len(items)
        essential = [reader for reader in self._readers if reader.sink.essential]
        with self._changed:
            self._flushed = all(reader.at == len(self._buffer) for reader in essential)
            # Where half of the limit is used, nothing waits for a sink that no checkpoint needs.
            waiting = self._readers if self._bytes <= self.limit / 2 else essential
            done = min((reader.at for reader in waiting), default=len(self._buffer))
            self._bytes -= sum(map(_size, self._buffer[:done]))
            self._answered = asked
            self._changed.notify_all()
        del self._buffer[:done]
        for reader in self._readers:
            reader.at = max(reader.at - done, 0)
        # The history may be on the same full disk: it is told when it can be.
        while self._untold and self._history("sink", **self._untold[0]):
            del self._untold[0]

    def _write(self, reader: _Reader, items: list[Record | Media]) -> bool:
        """Whether a sink is through with these items; False where they come again."""
        first = items[0]
        told = {
            "step": first.step if isinstance(first, Media) else first["step"],
            "sink": reader.sink.name,
        }
        try:
            reader.sink.write(items)
        except Exception as error:
            if not reader.told:
                reader.told, reason = "failed", f"{type(error).__name__}: {error}"
                message = "%s cannot be written: %s. Training goes on; it is tried again"
                logger.warning(message, reader.sink.name, reason)
                self._untold.append({**told, "failed": reason})
            if isinstance(error, OSError):
                return False
            self.lost += reader.sink.essential  # a bug, which would come again with them
        else:
            if reader.told == "failed":
                reader.told = "recovered"
                logger.info("%s is written again", reader.sink.name)
                self._untold.append({**told, "recovered": True})
        return True


def _size(item: Record | Media) -> int:
    return RECORD_BYTES + (item.nbytes if isinstance(item, Media) else 0)
