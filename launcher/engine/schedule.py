"""Learning rate schedules: pure functions of progress, tested without an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.data.plan import Plan
from launcher.runtime.progress import in_steps

# The factor of the base learning rate at a share of the run done, from 0 to 1.
Factor = Callable[[float], float]


def constant() -> Factor:
    return lambda done: 1.0


def linear(final: float) -> Factor:
    return lambda done: 1.0 + (final - 1.0) * done


def cosine(final: float) -> Factor:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, "SGDR", ICLR 2017, no restarts)."""
    return lambda done: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def step(milestones: list[float], gamma: float) -> Factor:
    """`gamma` once more for every milestone passed; milestones are shares of the run."""
    return lambda done: gamma ** sum(done >= milestone for milestone in milestones)


class Schedule:
    """The factor for each optimiser step, warm-up included.

    Warm-up rises linearly over its steps to the full rate; the schedule itself runs over the whole
    duration, so the end is where it would be without a warm-up.
    """

    def __init__(self, factor: Factor, total_steps: int, warmup_steps: int = 0) -> None:
        self.factor, self.total_steps, self.warmup_steps = factor, total_steps, warmup_steps

    def __call__(self, step: int) -> float:
        """The factor for the update that follows `step` updates."""
        factor = self.factor(min(step / self.total_steps, 1.0))
        if step < self.warmup_steps:
            factor *= (step + 1) / (self.warmup_steps + 1)
        return factor

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set every parameter group's rate from the one it was made with; the first is returned."""
        factor = self(step)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        return optimizer.param_groups[0]["lr"]


def build_schedule(cfg: CfgNode, plan: Plan) -> Schedule:
    """The schedule that OPTIM.* describes, over TRAIN.DURATION."""
    total = in_steps(cfg.TRAIN.DURATION, plan.steps_per_epoch)
    milestones = [in_steps(text, plan.steps_per_epoch) / total for text in cfg.OPTIM.MILESTONES]
    factors: dict[str, Factor] = {
        "constant": constant(),
        "linear": linear(cfg.OPTIM.FINAL_FACTOR),
        "cosine": cosine(cfg.OPTIM.FINAL_FACTOR),
        "step": step(milestones, cfg.OPTIM.GAMMA),
    }
    return Schedule(
        factors[cfg.OPTIM.SCHEDULE], total, in_steps(cfg.OPTIM.WARMUP, plan.steps_per_epoch)
    )
