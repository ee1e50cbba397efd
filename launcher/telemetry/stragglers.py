"""Which rank holds the others up: durations of each rank's own part of a step, never clocks."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)
# How much longer than the median rank's a rank's own part is when people are warned, once.
SLOW = 1.5
# How many ranks a log line names, slowest first.
NAMED = 16


class OwnTime:
    """Adds up, from step to step, the time from a step's begin to the end of this rank's own
    backward pass: waiting for data is in it, waiting for other ranks is not.

    On CUDA it is the device's time, taken by events that nobody waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds, self.steps = 0.0, 0
        self.began = 0.0
        self.event: torch.cuda.Event | None = None
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """A step begins."""
        if self.cuda:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        self.began = time.perf_counter()

    def watch(self, loss: torch.Tensor) -> None:
        """Take the end of the backward pass that is about to start from this loss."""

        def started(_: torch.Tensor) -> None:
            # Called back in the order in which they were asked for: this is the pass's first hook,
            # so it comes before DDP's own, which waits for the other ranks' gradients.
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

        loss.register_hook(started)

    def _ended(self) -> None:
        self.steps += 1
        if self.event is None:
            self.seconds += time.perf_counter() - self.began
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self.pending.append((self.event, end))
        self._settle()

    def _settle(self) -> None:
        while self.pending and self.pending[0][1].query():
            begin, end = self.pending.popleft()
            self.seconds += begin.elapsed_time(end) / 1e3

    def take(self) -> float:
        """Seconds a step since the last call. On CUDA call it where the device was waited for."""
        self._settle()
        mean = self.seconds / max(1, self.steps - len(self.pending))
        self.seconds, self.steps = 0.0, len(self.pending)
        return mean


class Stragglers:
    """On rank 0: what the ranks' own times tell."""

    def __init__(self) -> None:
        self.warned = False

    def figures(self, own: Sequence[float]) -> dict[str, float]:
        """`own` seconds a step by rank: the slowest rank, and its distance from the fastest. The
        log file has them all."""
        order = sorted(range(len(own)), key=lambda rank: -own[rank])
        named = ", ".join(f"{rank}: {own[rank]:.4g}" for rank in order[:NAMED])
        more = f", and {len(own) - NAMED} faster ones" if len(own) > NAMED else ""
        line = f"own seconds a step by rank, slowest first: {named}{more}"
        logger.info(line, extra={"file_only": True})
        slowest, median = order[0], statistics.median(own)
        if own[slowest] > SLOW * median and not self.warned:
            self.warned = True
            logger.warning(
                "rank %d holds the others up: its own part of a step takes %.4g s, the median "
                "rank's %.4g s (perf/slowest_rank and perf/rank_spread_s tell how it goes on)",
                *(slowest, own[slowest], median),
            )
        return {
            "perf/slowest_rank": slowest,
            "perf/rank_spread_s": own[slowest] - own[order[-1]],
        }
