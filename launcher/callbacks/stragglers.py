"""Which rank holds the others up: durations of each rank's own part of a step, never clocks."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
# How much longer than the median rank's a rank's own part is when people are warned, once.
SLOW = 1.5
# How many ranks a log line names, slowest first.
NAMED = 16


class Stragglers:
    """`perf/slowest_rank`, and `perf/rank_spread_s`, its distance from the fastest.

    A rank's own part is the time from a step's begin to the end of its own backward pass: waiting
    for data is in it, waiting for other ranks is not. On CUDA it is the device's time, taken by
    events that nobody waits for.
    """

    def __init__(self, run: Run) -> None:
        self.cuda = run.runtime.device.type == "cuda"
        self.warned = False
        self.seconds, self.steps, self.passes = 0.0, 0, 0  # a pass back for each phase
        self.began: Any = 0.0
        self.ended: Any = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def before_step(self, samples: int) -> None:
        self.steps += 1
        self.began = self.ended = self._now()  # the end of a rank without samples

    def on_backward(self, loss: torch.Tensor) -> None:
        def started(_: torch.Tensor) -> None:
            # Called back in the order in which they were asked for: this is the pass's first hook,
            # so it comes before DDP's own, which waits for the other ranks' gradients.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

        loss.register_hook(started)

    def on_gradients(self) -> None:
        self.passes += 1
        if self.cuda:
            self.pending.append((self.began, self.ended))
            self._settle()
        else:
            self.seconds += self.ended - self.began
        self.began = self.ended = self._now()  # of the next phase

    def local_figures(self) -> dict[str, float]:
        """Seconds a step since the last record."""
        self._settle()
        known = max(1, self.passes - len(self.pending))
        mean = self.seconds / known * self.passes / max(1, self.steps)
        self.seconds, self.steps, self.passes = 0.0, 0, len(self.pending)
        return {"own_s": mean}

    def figures(
        self, record: Mapping[str, Any], ranks: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        own = [rank["own_s"] for rank in ranks]
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
        return {"perf/slowest_rank": slowest, "perf/rank_spread_s": own[slowest] - own[order[-1]]}

    def _end(self) -> None:
        self.ended = self._now()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        while self.pending and self.pending[0][1].query():
            began, ended = self.pending.popleft()
            self.seconds += began.elapsed_time(ended) / 1e3
