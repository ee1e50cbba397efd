"""A board that all ranks of an attempt write on and read: how far each is, and what went wrong.

It lies in torchrun's store (or in rank 0's, under srun), beside the process group and without its
collectives. A store whose host is frozen ignores its own timeouts (measured), so all calls are made
in a thread, and whoever asks waits only so long.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist


class Unreachable(Exception):
    """The store did not answer in time."""


class Board:
    """JSON values under names. Raises Unreachable where the store does not answer."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, answer_s: float = 5.0) -> None:
        """`ranks` is how many there are, `answer_s` how long the store may take to answer."""
        self.store, self.rank, self.ranks, self.answer_s = store, rank, ranks, answer_s
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (future, function), or None
        self._late: Future[Any] | None = None  # a question that had no answer in time
        self._peeked: Future[Any] | None = None
        self.thread = threading.Thread(target=self._serve, name="board", daemon=True)
        self.thread.start()

    def post(self, name: str, value: Any) -> None:
        """Write a value under a name and this rank's number; waits for nothing."""
        # What a store that hangs has not taken yet is overtaken by what comes now.
        if self._calls.qsize() < 8:
            text = json.dumps(value)
            self._call(lambda: self.store.set(f"{name}/{self.rank}", text))

    def read(self, name: str) -> dict[int, Any]:
        """What each rank has written under a name, by rank; those that have not are left out."""

        def read() -> dict[int, Any]:
            keys = {f"{name}/{rank}": rank for rank in range(self.ranks)}
            # One request where all are there, as nearly always.
            if not self.store.check([*keys]):
                keys = {key: rank for key, rank in keys.items() if self.store.check([key])}
            values = self.store.multi_get([*keys]) if keys else []
            return {rank: json.loads(v) for rank, v in zip(keys.values(), values, strict=True)}

        return self._ask(read)

    def first(self, name: str, value: Any) -> Any:
        """Write a value unless there is one under this name; the one that stands now."""
        text = json.dumps(value)
        return json.loads(self._ask(lambda: self.store.compare_set(name, "", text)))

    def peek(self, name: str) -> Any:
        """The value that `first` wrote under a name, as far as the last call's question is answered
        by now; None else. Waits for nothing."""

        def get() -> Any:
            return json.loads(self.store.get(name)) if self.store.check([name]) else None

        asked = self._peeked
        if asked is not None and not asked.done():
            return None
        self._peeked = self._call(get)
        return asked.result() if asked is not None and asked.exception() is None else None

    def close(self) -> None:
        self._calls.put(None)
        self.thread.join(5.0)  # a hanging call is left to the process's end, which it may abort

    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, function))
        return future

    def _ask(self, function: Callable[[], Any]) -> Any:
        if self._late is not None and not self._late.done():
            raise Unreachable("an earlier question is not answered yet")
        asked = self._call(function)
        try:
            return asked.result(self.answer_s)
        except Exception as error:  # torch's own errors, and the time-out of the wait
            self._late = asked
            raise Unreachable(str(error)) from error

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
