"""A message that comes again and again: shown, then counted, and the count shown."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

WINDOW_S = 60.0
MOST = 1000  # messages that are remembered

Key = tuple[str, int, str, str]


@dataclass
class _Seen:
    record: logging.LogRecord
    since: float
    count: int = 0
    at: float = 0.0  # the last of them


class Repeats:
    """Passes a message on, and holds the same one back for a minute; then says how many it were.

    No lock of its own: a log handler calls it under its lock, which a forked process gets anew.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.window_s = window_s
        self.seen: OrderedDict[Key, _Seen] = OrderedDict()  # the oldest window first

    def __call__(self, record: logging.LogRecord) -> list[logging.LogRecord]:
        """The records to show now: this one, unless it is a repeat, and counts that are due."""
        due = self._due(record.created)
        error = str(record.exc_info[1]) if record.exc_info else ""
        key = (record.name, record.levelno, record.getMessage(), error)
        if (seen := self.seen.get(key)) is not None:
            seen.count, seen.at = seen.count + 1, record.created
            return due
        self.seen[key] = _Seen(record, record.created)
        if len(self.seen) > MOST:
            _, oldest = self.seen.popitem(last=False)
            due += [_told(oldest)] if oldest.count else []
        return [*due, record]

    def end(self) -> list[logging.LogRecord]:
        """The counts that nobody has seen yet."""
        left = [_told(seen) for seen in self.seen.values() if seen.count]
        self.seen.clear()
        return left

    def _due(self, now: float) -> list[logging.LogRecord]:
        due = []
        while self.seen:
            key, seen = next(iter(self.seen.items()))
            if now - seen.since < self.window_s:
                break
            del self.seen[key]
            if seen.count:
                due.append(_told(seen))
                # It goes on: the next count in a minute, not a line now.
                self.seen[key] = _Seen(seen.record, now)
        return due


def _told(seen: _Seen) -> logging.LogRecord:
    first = seen.record
    seconds = max(seen.at - seen.since, 0.0)
    text = f"(repeated {seen.count} times in {seconds:.0f} s) {first.getMessage()}"
    record = logging.LogRecord(
        first.name, first.levelno, first.pathname, first.lineno, text, None, None, first.funcName
    )
    record.repeated = first.getMessage()
    record.__dict__.update({k: v for k, v in first.__dict__.items() if k not in record.__dict__})
    return record
