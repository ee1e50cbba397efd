"""Processes forked from the test's, as loader workers are from a rank."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable


def fork(work: Callable[[], int | None]) -> int:
    """Start a process that does this and ends as a loader worker does; its pid. Its exit code is
    what `work` returns, 1 after an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)  # nothing in it may wait for the rank
            result = work() or 0
            logging.shutdown()
            code = result
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
