"""Waiting for what another process or thread does: the one way in all tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float = 120, what: str = "the condition") -> T:
    """Wait until `condition()` is true, and return what it returned.

    A wait that succeeds takes no longer than it must, so `timeout` may be generous: it is there for
    a machine that is busy with other things. AssertionError with `what` when it has passed.
    """
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        time.sleep(0.01)
    return found
