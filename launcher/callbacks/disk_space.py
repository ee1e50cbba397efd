"""A warning where the disk has no room for the checkpoints that are kept, and one being written."""

from __future__ import annotations

import shutil

from launcher.callbacks import Run
from launcher.config.checks import averages
from launcher.config.optim import ADAMS
from launcher.log import get_logger

logger = get_logger(__name__)


class DiskSpace:
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_start(self) -> None:
        cfg, path = self.run.cfg, self.run.directory
        if self.run.runtime.rank != 0:
            return
        # Weights, their average, and as much again as the optimiser may keep for each weight.
        tensors = [t for t in self.run.model.state_dict().values() if hasattr(t, "element_size")]
        weights = sum(t.numel() * t.element_size() for t in tensors)
        copies = 2 + averages(cfg) + (cfg.OPTIM.NAME in ADAMS)
        kept = cfg.CHECKPOINT.KEEP_LAST + cfg.CHECKPOINT.KEEP_BEST
        needed = (kept + 1) * weights * copies
        free = shutil.disk_usage(path).free
        if free < needed:
            logger.warning(
                "%.1f GiB are free in %s, and %d checkpoints with one being written need about "
                "%.1f GiB: free some, or lower CHECKPOINT.KEEP_LAST and KEEP_BEST",
                *(free / 2**30, path, kept, needed / 2**30),
            )
