"""A board that all ranks of an attempt write on and read: how far each is, and what went wrong.

It lies in torchrun's store (or in rank 0's, under srun), beside the process group and without its
collectives. A store whose host is frozen ignores its own timeouts (measured), so all calls are made
in a thread, and whoever asks waits only so long.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
ANSWER_S = 5.0


class Unreachable(Exception):
    """The store did not answer in time."""


class Board:
    """JSON values under names. Raises Unreachable where the store does not answer."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, answer_s: float = ANSWER_S
    ) -> None:
        """`answer_s` is how long the store may take to answer."""
        self.store, self.rank, self.world_size = store, rank, world_size
        self.answer_s = answer_s
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._late: Future[Any] | None = None  # a question that had no answer in time
        self._peeks: dict[str, Future[Any]] = {}
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
            keys = [f"{name}/{rank}" for rank in range(self.world_size)]
            # One request where all are there, as nearly always.
            present = keys if self.store.check(keys) else [k for k in keys if self.store.check([k])]
            values = self.store.multi_get(present) if present else []
            return {
                int(k.rpartition("/")[2]): json.loads(v)
                for k, v in zip(present, values, strict=True)
            }

        return self._ask(read)

    def first(self, name: str, value: Any) -> Any:
        """Write a value unless there is one under this name; the one that stands now."""
        text = json.dumps(value)
        return json.loads(self._ask(lambda: self.store.compare_set(name, "", text)))

    def seen(self, name: str) -> Any:
        """The value that `first` wrote under a name, or None."""
        return self._ask(lambda: self._get(name))

    def peek(self, name: str) -> Any:
        """The same as far as the last call's question is answered by now; waits for nothing."""
        asked = self._peeks.get(name)
        if asked is not None and not asked.done():
            return None
        self._peeks[name] = self._call(lambda: self._get(name))
        return asked.result() if asked is not None and asked.exception() is None else None

    def flush(self) -> None:
        """Wait until what was posted is there, or the store does not answer."""
        with contextlib.suppress(Unreachable):
            self._ask(lambda: None)

    def close(self) -> None:
        self._calls.put(None)
        self.thread.join(1.0)  # a hanging call is left to the process's end

    def _get(self, name: str) -> Any:
        return json.loads(self.store.get(name)) if self.store.check([name]) else None

    def _call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, function))
        return future

    def _ask(self, function: Callable[[], T]) -> T:
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
