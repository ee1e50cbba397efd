"""Python logging that is shared with others: loggers that nobody's set-up takes away, and which of
other people's handlers write to the console. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class OwnLogger(logging.Logger):
    """A logger that its level alone mutes: neither `logging.disable` nor logging.config, which
    disables all loggers that it is not told of."""

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        """Nothing: it is not even an error, for a set-up that means others."""

    def isEnabledFor(self, level: int) -> bool:
        return level >= self.getEffectiveLevel()


def get_logger(name: str) -> logging.Logger:
    """The launcher's own logger of this name, as `logging.getLogger` gives it from now on."""
    logger = logging.getLogger(name)
    logger.__class__ = OwnLogger  # somebody may have asked for it before, to set its level
    return logger


@contextlib.contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile, `around(function, ...)` is called for this function of the owner's."""
    function, active = getattr(owner, name), True

    def call(*args: Any, **options: Any) -> Any:
        return around(function, *args, **options) if active else function(*args, **options)

    setattr(owner, name, call)
    yield
    active = False  # somebody may have wrapped it once more, and keep it
    if getattr(owner, name) is call:
        setattr(owner, name, function)


def console_of(handler: logging.Handler) -> Any:
    """Which console a handler of logging's kind, or of rich's, writes to; None for any other."""
    console = getattr(handler, "console", None)
    end = _end(getattr(handler, "stream", None) or getattr(console, "file", None))
    return end if end in consoles() else None


def consoles() -> set[Any]:
    """Where this process's standard streams end at present."""
    return set(map(_end, (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)))


def _end(stream: Any) -> Any:
    """The same for all streams that end in one file, pipe or terminal."""
    try:
        status = os.fstat(stream.fileno())
        return status.st_dev, status.st_ino
    except Exception:  # a notebook's stream, say
        return None if stream is None else id(stream)


def shown_on(record: logging.LogRecord) -> dict[Any, int | None]:
    """The consoles that a line stands on, and those that a thread may be putting it on, with that
    thread. Copies of the record share it."""
    return vars(record).setdefault("_shown_on", {})
