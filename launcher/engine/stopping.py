"""When a run must begin to stop, so that its last checkpoint is written in time."""

from __future__ import annotations

import logging
import os
import time

import psutil

from launcher.config import CfgNode, parse_duration
from launcher.engine.agreement import LAG
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import shutdown_timeout

logger = logging.getLogger(__name__)
# Slurm kills at the very second of its limit; the job file still has something to do before.
SLURM_SPARE_S = 30.0


class StopMargin:
    """How long a stop takes, in seconds: the ranks agree a step later, on CUDA some more, and the
    last checkpoint has to be written."""

    def __init__(self, runtime: Runtime, progress: Progress) -> None:
        self.began, self.progress, self.first = time.monotonic(), progress, progress.step
        self.steps = 2 + (LAG if runtime.device.type == "cuda" else 0)
        self.longest_save_s = 0.0
        by = runtime.topology.launched_by
        self.granted_s = shutdown_timeout(os.environ) if by == "torchrun" else None

    def __call__(self) -> float:
        steps = self.progress.step - self.first
        per_step = (time.monotonic() - self.began) / max(1, steps)
        return self.longest_save_s + self.steps * per_step

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took."""
        self.longest_save_s = max(self.longest_save_s, seconds)
        if self.granted_s is not None and (needed := self()) > self.granted_s:
            logger.warning(
                "A stop takes about %.0f s (a save took %.1f s), but torchrun kills its ranks %g s "
                "after it was told to stop, and the steps since the last checkpoint would be lost. "
                "Start it with --shutdown-timeout=%.0f or more (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).",
                *(needed, seconds, self.granted_s, 2 * needed),
            )
            self.granted_s = None  # once is enough


def deadlines(cfg: CfgNode) -> dict[str, float]:
    """The moments of time.monotonic() at which this attempt must have stopped, by what sets them:
    TRAIN.MAX_TIME after the process began, and the end of Slurm's time limit."""
    found = {}
    if (most := parse_duration(cfg.TRAIN.MAX_TIME)) is not None:
        age = time.time() - psutil.Process().create_time()
        found[f"TRAIN.MAX_TIME {cfg.TRAIN.MAX_TIME}"] = time.monotonic() - age + most.amount
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        found["Slurm's time limit"] = time.monotonic() + int(end) - time.time() - SLURM_SPARE_S
    return found
