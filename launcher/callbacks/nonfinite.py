"""Losses and gradients that are not finite: when, on which rank, and what to do about it."""

from __future__ import annotations

from collections import deque

import torch

from launcher.callbacks import Run
from launcher.errors import RunError
from launcher.guard.stop import LAG
from launcher.log import get_logger

logger = get_logger(__name__)


class Nonfinite:
    """Tells of a loss or a gradient that is not finite, and stops all ranks at the same step where
    the config says so.

    The ranks learn of it as they do of requests (engine/agreement.py): at once on the CPU, some
    steps later on CUDA, but always before a checkpoint is taken. Which rank it was is asked only
    then. In fp16 only losses are looked at: the gradient scaler meets infinite gradients by design.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.stops = run, run.cfg.DEBUG.NONFINITE == "stop"
        self.told = -1  # the last step that was told of
        # Of the answers that the ranks may not have read yet: step, phase, and this rank's losses.
        self.passes: deque[tuple[int, str, list[torch.Tensor]]] = deque(maxlen=16 * (LAG + 1))
        self.losses: list[torch.Tensor] = []

    def before_step(self, samples: int) -> None:
        self.losses = []

    def on_backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())

    def on_gradients(self) -> None:
        step, phase = self.run.progress.step + 1, self.run.recorder.phase
        self.passes.append((step, phase, self.losses))
        self.losses = []

    def on_nonfinite(self, late: int) -> None:
        """So many answers after this one have not been read yet."""
        if late >= len(self.passes):  # of the attempt before
            return
        step, phase, losses = self.passes[-1 - late]
        if step <= self.told:
            return
        self.told = step
        # Waits for the device: something is wrong, and time no matter.
        ours = [i for i, loss in enumerate(losses) if not loss.isfinite().item()]
        # Collectives: all ranks are here at the same step.
        ranks = self.run.runtime.broadcast(self.run.runtime.gather(ours))
        where = next((rank for rank, found in enumerate(ranks) if found), 0)
        what, how = (f" of phase {phase}" if phase else ""), ""
        if any(ranks):
            named = [f"rank {r} (micro-batch {f[0] + 1})" for r, f in enumerate(ranks) if f]
            how = f"the loss{what} is not finite on {', '.join(named)}"
        else:
            how = f"the losses{what} are finite, but their gradients are not"
        text = (
            f"step {step}: {how}. To run that step again and look at it: launcher replay "
            f"{self.run.directory} --step {step} --rank {where} --stats"
        )
        if self.stops:
            raise RunError(f"{text} (DEBUG.NONFINITE stop: no checkpoint holds what came of it)")
        if self.run.runtime.is_main:
            logger.warning("%s", text)
