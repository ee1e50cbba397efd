"""Saving beside the training: the state of one step boundary is copied at once, then written in a
thread.

To copy it beside the next step would block the training for less, but a task may move any weight at
any moment, and nothing could tell that the copy is torn. The copies stay for the next save: memory
touched for the first time costs more than the copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from launcher.checkpoint.store import CheckpointStore
from launcher.edges.batch import is_dense, map_tensors
from launcher.edges.state import check, kinds, plain
from launcher.errors import RunError
from launcher.log import get_logger

logger = get_logger(__name__)


class Saver:
    """Commits states to a store, at most one at a time. Rank 0 alone has one."""

    def __init__(
        self,
        store: CheckpointStore,
        done: Callable[[dict[str, Any], float, Exception | None], None],
    ) -> None:
        """`done(manifest, seconds, error)` is called in the writing thread after each save."""
        self.store, self.done = store, done
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[Exception | None] | None = None
        self.copies: list[torch.Tensor] = []  # in the order in which the state's tensors stand
        self.pending: dict[str, Any] | None = None
        self.checked: set[int] = set()  # kinds of state that are known to come back

    def save(self, state: dict[str, Any], manifest: dict[str, Any], last: bool = False) -> None:
        """Copy the state, and start to write it.

        Waits for the save before this one: its copy is still being written. A save that is skipped
        instead could be that of a new best. The `last` one of an attempt is waited for and, since
        nothing comes after it that could be tried instead, tried once more: then RunError. That is
        raised, too, for a state that could not be loaded again.
        """
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > 1:
            logger.warning(
                "waited %.1f s for the checkpoint before this one to be written: "
                "CHECKPOINT.EVERY is shorter than a save takes",
                waited,
            )
        state = plain(state)
        if (kind := kinds(state)) not in self.checked:
            check(state)
            self.checked.add(kind)
        old, self.copies = iter(self.copies), []

        def copy(value: torch.Tensor) -> torch.Tensor:
            if not is_dense(value):
                return value.detach().to("cpu", copy=True)
            kept = next(old, None)
            # The layout too: an optimiser's fused kernel walks its state as its weights lie.
            same = kept is not None and (kept.shape, kept.stride()) == (value.shape, value.stride())
            if kept is None or not same or kept.dtype != value.dtype:
                kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            # On CUDA the copy is one more piece of work on this stream: the host goes on, and
            # nothing that comes after it can change what is copied.
            kept.copy_(value, non_blocking=True)
            self.copies.append(kept)
            return kept

        with torch.no_grad():
            snapshot, copied = map_tensors(state, copy), None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self.pending = manifest

        def write() -> Exception | None:
            error: Exception | None = None
            try:
                if copied is not None:
                    copied.synchronize()  # in this thread: the training does not wait
                self.store.commit(snapshot, manifest)
            except Exception as caught:
                # A save that fails must not end a run of days: it is told, and tried again when the
                # next one is due. The checkpoints before it are still there.
                error = caught
            self.pending = None
            seconds = time.monotonic() - began
            if error is None:
                logger.info("checkpoint step_%d (%.2f s)", manifest["step"], seconds)
            else:
                logger.warning(
                    "checkpoint step_%d could not be saved: %s: %s. Training goes on; the next "
                    "save is tried when it is due.",
                    *(manifest["step"], type(error).__name__, error),
                )
            try:
                self.done(manifest, seconds, error)
            except Exception:
                logger.exception("after checkpoint step_%d", manifest["step"])
            return error

        self.writing = self.thread.submit(write)
        if last and self.wait() is not None:
            self.writing = self.thread.submit(write)
            if (error := self.wait()) is not None:
                raise RunError(f"the last checkpoint could not be saved: {error}") from error

    def wait(self) -> Exception | None:
        """Wait until nothing is in flight; what the last save failed with, if it did."""
        return self.writing.result() if self.writing is not None else None

    def close(self) -> None:
        self.thread.shutdown()
