"""Warnings: on the console once, though every rank may give the same one.

Rank 0 shows its own at once. One of another rank waits a moment; then it is shown, with its rank,
by whoever is the first to claim it on the ranks' board. Errors never wait.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.guard.board import Board, Unreachable

WAIT_S = 1.0  # how much later than another rank rank 0 may be, and still be the first


class Elsewhere:
    """The warnings of this rank, on their way to `show`. Who logs waits for no board."""

    def __init__(self, rank: int, show: Callable[[logging.LogRecord], None]) -> None:
        self.rank, self.show = rank, show
        self.waiting: queue.SimpleQueue[tuple[float, logging.LogRecord] | None]
        self.waiting = queue.SimpleQueue()
        self.reachable = True
        self.ended = False  # no board (any more): all is shown

    def add(self, record: logging.LogRecord) -> None:
        if self.rank == 0 or self.ended:
            self.show(record)
        if not self.ended:
            self.waiting.put((time.monotonic(), record))

    @contextmanager
    def beside(self, board: Board | None) -> Iterator[None]:
        """Use the board while it lasts; warnings from before have waited for it."""
        thread = threading.Thread(target=self._run, args=(board,), name="warnings", daemon=True)
        if board is not None:
            thread.start()
        else:
            self.end()
        try:
            yield
        finally:
            self.ended = True
            self.waiting.put(None)
            if board is not None:
                thread.join(10)

    def end(self) -> None:
        """Show what still waits."""
        self.ended = True
        while not self.waiting.empty():
            if (item := self.waiting.get()) is not None and self.rank:
                self.show(item[1])

    def _run(self, board: Board) -> None:
        joined = time.monotonic()  # all ranks are joining at about this time
        while (item := self.waiting.get()) is not None:
            given, record = item
            if self.rank and not hasattr(record, "repeated"):
                time.sleep(max(max(given, joined) + WAIT_S - time.monotonic(), 0.0))
            if self._is_first(board, record) and self.rank:
                self.show(record)

    def _is_first(self, board: Board, record: logging.LogRecord) -> bool:
        # What makes two warnings the same: level, logger and first line. A count belongs to the
        # message that it counts.
        line, _, _ = getattr(record, "repeated", record.getMessage()).partition("\n")
        same = hashlib.sha256(f"{record.levelno} {record.name} {line}".encode()).hexdigest()
        try:
            return not self.reachable or board.first(f"warning/{same}", self.rank) == self.rank
        except Unreachable:
            self.reachable = False  # one wait for it is enough
            return True
