"""Learning rate schedules: pure functions of progress, tested without an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.data.plan import Plan
from launcher.edges.optimizer import as_left, set_by_others, set_rate
from launcher.edges.returned import own_schedule
from launcher.errors import RunError
from launcher.runtime.progress import in_steps

# The factor of the base rate at a share, 0 to 1, of the way from the warm-up's end to the run's.
Factor = Callable[[float], float]


def constant() -> Factor:
    return lambda done: 1.0


def linear(final: float) -> Factor:
    return lambda done: 1.0 + (final - 1.0) * done


def cosine(final: float) -> Factor:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, "SGDR", ICLR 2017, no restarts)."""
    return lambda done: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def step(milestones: list[float], gamma: float) -> Factor:
    """`gamma` once more for every milestone passed; milestones are shares of the same way."""
    return lambda done: gamma ** sum(done >= milestone for milestone in milestones)


class Schedule:
    """The factor for each optimiser step: first the warm-up, which rises linearly to the full rate,
    then the schedule, from the warm-up's end to the run's end. They are never multiplied, so the
    full rate is reached.
    """

    def __init__(
        self,
        factor: Factor,
        total_steps: int,
        warmup_steps: int = 0,
        steady: bool = False,
        own: Callable[[int, int], float] | None = None,
    ) -> None:
        """`steady` where the rate never changes: what a task sets itself then stays. `own` takes
        the factor's place: by steps done since the warm-up's end, and how many there are."""
        self.factor, self.total_steps, self.warmup_steps = factor, total_steps, warmup_steps
        self.steady, self.own = steady, own
        self._set: list[Any] = []  # the rates as they were left

    def __call__(self, step: int) -> float:
        """The factor for the update that follows `step` updates."""
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done, left = step - warmup, self.total_steps - warmup
        return self.own(done, left) if self.own else self.factor(min(done / max(left, 1), 1.0))

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every parameter group's rate from the one it was made with. Raises RunError where
        somebody else sets it as well."""
        groups = optimizer.param_groups
        if self._set and set_by_others(optimizer, self._set):
            raise RunError(
                f"the learning rate was changed between steps, to {groups[0].get('lr')}, but "
                "OPTIM.SCHEDULE, OPTIM.WARMUP or the task's schedule set it before each step. To "
                'set it elsewhere, take OPTIM.SCHEDULE constant, OPTIM.WARMUP "" and no schedule.'
            )
        if self.steady:  # whoever sets them may
            groups = [group for group in groups if "initial_lr" not in group]
        for group in groups:
            set_rate(group, self(step))
        if not self.steady:
            self._set = as_left(optimizer)


def build_schedule(cfg: CfgNode, task: Any, plan: Plan, phase: str = "") -> Schedule:
    """The schedule that OPTIM.* describes, over TRAIN.DURATION, or that of the task where it has
    one, after OPTIM.WARMUP; of its dict's, where it returns one, that for the `phase`."""
    total, warmup, *milestones = (
        in_steps(text, plan.steps_per_epoch)
        for text in (cfg.TRAIN.DURATION, cfg.OPTIM.WARMUP, *cfg.OPTIM.MILESTONES)
    )
    shares = [(milestone - warmup) / max(total - warmup, 1) for milestone in milestones]
    factors: dict[str, Factor] = {
        "constant": constant(),
        "linear": linear(cfg.OPTIM.FINAL_FACTOR),
        "cosine": cosine(cfg.OPTIM.FINAL_FACTOR),
        "step": step(shares, cfg.OPTIM.GAMMA),
    }
    own = own_schedule(task, phase)
    steady = cfg.OPTIM.SCHEDULE == "constant" and not warmup and own is None
    return Schedule(factors[cfg.OPTIM.SCHEDULE], total, warmup, steady, own)
