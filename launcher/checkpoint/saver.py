"""Saving beside the training: the state of one step boundary is copied, then written in a thread.

Weights, optimiser state and averages change only in the optimiser's step, so their copy runs beside
the next forward and backward pass and the next update waits for it (the idea of CheckFreq, Mohan et
al., FAST 2021). Buffers that the forward pass changes are copied at once. The copies stay for the
next save: memory touched for the first time costs more than the copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from launcher.checkpoint.store import CheckpointStore

logger = logging.getLogger(__name__)


class Saver:
    """Commits states to a store, at most one at a time. Rank 0 alone has one."""

    def __init__(
        self,
        store: CheckpointStore,
        device: torch.device,
        done: Callable[[dict[str, Any], float, Exception | None], None],
    ) -> None:
        """`done(manifest, seconds, error)` is called in the writing thread after each save."""
        self.store, self.device, self.done = store, device, done
        # Two threads: the copy of a save never waits behind the writing of another.
        self.copier = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-copy")
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-write")
        self.copying: Future[None] | None = None
        self.writing: Future[Exception | None] | None = None
        self.copied: torch.cuda.Event | None = None
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[str, torch.Tensor] = {}
        self.pending: dict[str, Any] | None = None

    def save(
        self, state: dict[str, Any], manifest: dict[str, Any], changing: list[torch.Tensor]
    ) -> None:
        """Start to save. `changing` are the tensors that the forward pass changes.

        Waits for the save before this one: its copy of the state is still being written. A save
        that is skipped instead could be that of a new best.
        """
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > 1:
            logger.warning(
                "waited %.1f s for the checkpoint before this one to be written: "
                "CHECKPOINT.EVERY is shorter than a save takes",
                waited,
            )
        at_once = {tensor.data_ptr() for tensor in changing}
        later: list[tuple[torch.Tensor, torch.Tensor]] = []
        used: set[str] = set()

        def copy(value: Any, path: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{path}/{key}") for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)([copy(item, f"{path}/{i}") for i, item in enumerate(value)])
            if not isinstance(value, torch.Tensor):
                return value
            used.add(path)
            buffer = self.buffers.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self.buffers[path] = buffer
            if value.data_ptr() in at_once:
                buffer.copy_(value)  # waits for the device, for buffers alone
            else:
                later.append((buffer, value))
            return buffer

        snapshot = copy(state, "")
        for path in set(self.buffers) - used:
            del self.buffers[path]
        self.pending = manifest
        if self.side is not None:
            # The copies start when the device has finished this step, on a stream of their own.
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                for buffer, value in later:
                    buffer.copy_(value, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(self.side)
        else:
            self.copying = self.copier.submit(_copy_all, later)
        self.writing = self.writer.submit(
            self._write, snapshot, manifest, self.copying, self.copied, began
        )

    def before_update(self) -> None:
        """Call before anything saved is changed: waits until it is copied."""
        if self.copying is not None:
            self.copying.result()
            self.copying = None
        if self.copied is not None:
            # The device waits for the copy, the host does not.
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None

    def wait(self) -> Exception | None:
        """Wait until nothing is in flight; what the last save failed with, if it did."""
        self.before_update()
        return self.writing.result() if self.writing is not None else None

    def close(self) -> None:
        self.wait()
        self.copier.shutdown()
        self.writer.shutdown()

    def _write(
        self,
        snapshot: dict[str, Any],
        manifest: dict[str, Any],
        copying: Future[None] | None,
        copied: torch.cuda.Event | None,
        began: float,
    ) -> Exception | None:
        error: Exception | None = None
        try:
            if copying is not None:
                copying.result()
            if copied is not None:
                copied.synchronize()  # in this thread: the training does not wait
            self.store.commit(snapshot, manifest)
        except Exception as caught:
            # A save that fails must not end a run of days: it is told, and tried again when the
            # next one is due. The checkpoints before it are still there.
            error = caught
        self.pending = None
        self.done(manifest, time.monotonic() - began, error)
        return error


def _copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for buffer, value in pairs:
        buffer.copy_(value)
