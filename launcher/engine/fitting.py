"""TRAIN.MICRO_BATCH_SIZE auto: micro-batches as large as memory allows.

The first step tries a rank's whole share at once. A step in which any rank runs out of device
memory is undone on all of them, and taken again from the same samples in micro-batches of half the
size, which stay: a checkpoint keeps it, for sums of other parts round otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from launcher.checkpoint.state import TrainingState
from launcher.data.splits import GlobalBatch
from launcher.edges.generators import random_state, set_random_state
from launcher.edges.model import fill
from launcher.edges.numbers import Sums
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime

logger = get_logger(__name__)
ONE_FORWARD = (
    "TRAIN.MICRO_BATCH_SIZE auto takes a step again where it runs out of memory, which does not go "
    "with {}: give it a number."
)


class TooLarge(Exception):
    """Some rank has run out of memory."""


class Fitting:
    """What a step changes before its gradients cross, and puts back where one has no room."""

    def __init__(self, state: TrainingState, runtime: Runtime, gather: Gather) -> None:
        self.state, self.runtime = state, runtime
        self.sums, self.error = state.recorder.sums, ""
        if "" not in state.optimizers:
            raise UsageError(ONE_FORWARD.format("phases"))
        if runtime.distributed:  # a rank without room would miss the others' gather
            gather.refused = ONE_FORWARD.format("self.gather")

    def begin(self) -> None:
        """Note where a step begins."""
        self.random = random_state()
        self.buffers = [buffer.clone() for buffer in self.state.model.buffers()]
        self.error = ""
        self.state.recorder.sums = Sums(self.runtime.device)  # of this step alone

    def note(self, error: torch.OutOfMemoryError) -> None:
        """This rank has no room; the rest of its micro-batches is left out."""
        self.error = str(error)

    def rounds(self, sizes: list[int]) -> Iterator[tuple[int, int]]:
        """The samples of each round that is taken; with other ranks the last is the exchange's.
        Raises TooLarge on all ranks, before that."""
        last = len(sizes) - 1 if self.runtime.distributed else len(sizes)
        for i, samples in enumerate(sizes[:last]):
            if not self.error:
                yield i, samples
        self._settle()
        yield from enumerate(sizes[last:], last)

    def _settle(self) -> None:
        # A collective, and a wait for the device in it: all ranks learn whether one has no room.
        errors = self.runtime.gather(self.error)
        self.error = self.runtime.broadcast(next(filter(None, errors or []), ""))
        recorder, took = self.state.recorder, self.state.recorder.sums
        recorder.sums = self.sums
        if self.error:
            raise TooLarge
        recorder.sums.absorb(took)

    def again(self) -> Iterator[GlobalBatch]:
        """The global batches from that of the step on, which is undone, in smaller micro-batches.
        Raises OutOfMemoryError where they hold one sample."""
        data, plan = self.state.data, self.state.data.train_plan
        set_random_state(self.random)
        fill(self.state.model.buffers(), self.buffers)
        gc.collect()  # what the failed pass left, before memory is asked for anew
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        size = max(stop - start for start, stop in plan.micro_batches(0, 0))
        if size == 1:
            raise torch.OutOfMemoryError(f"{self.error}\nNot one sample has room.")
        half = -(-size // 2)
        data.train_plan = replace(plan, micro_batch_size=half)
        logger.warning("no room for micro-batches of %d samples: %d from here on", size, half)
        samples: Any = self.state.progress.samples
        data.close()
        data.start(samples, data.stream_state(samples), torch.get_num_threads())
        return data.batches()
