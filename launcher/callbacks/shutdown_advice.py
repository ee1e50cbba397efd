"""Advice, once an attempt, where torchrun grants a stop too little time."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping

import psutil

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
STEPS = 2  # that the ranks may still take, to agree on the stop


class ShutdownAdvice:
    """For ranks that torchrun has started."""

    def __init__(self, run: Run) -> None:
        self.progress, self.granted_s = run.progress, shutdown_timeout(os.environ)
        self.began, self.first, self.told = time.monotonic(), 0, False

    def on_start(self) -> None:
        self.began, self.first = time.monotonic(), self.progress.step

    def on_saved(self, seconds: float) -> None:
        a_step = (time.monotonic() - self.began) / max(1, self.progress.step - self.first)
        needed = seconds + STEPS * a_step
        if self.told or needed <= self.granted_s:
            return
        self.told = True
        logger.warning(
            "A stop takes about %.0f s (a save took %.1f s), but torchrun kills its ranks %g s "
            "after it was told to stop, and the steps since the last checkpoint would be lost. "
            "Start it with --shutdown-timeout=%.0f or more (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).",
            *(needed, seconds, self.granted_s, 2 * needed),
        )


def shutdown_timeout(env: Mapping[str, str]) -> float:
    """Seconds that torchrun gives its ranks between SIGTERM and SIGKILL.

    https://docs.pytorch.org/docs/stable/elastic/run.html; a torch without the setting gives 30.
    """
    command = ""
    with contextlib.suppress(psutil.Error):
        command = " ".join(psutil.Process(os.getppid()).cmdline())
    found = re.search(r"--shutdown[-_]timeout[= ](\d+)", command)
    text = found[1] if found else env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    return float(text) if text.isdigit() else 30.0
