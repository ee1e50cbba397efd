"""Schedules: courses that are applied to the groups of an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.data.plan import Plan
from launcher.edges.optimizer import as_left, set_by_others, set_rate, set_value
from launcher.edges.returned import own_schedule
from launcher.errors import RunError
from launcher.optim.curves import Course, Factor, course, others


class Schedule(Course):
    """A course that sets the rates of an optimiser before each step; `others` are those of what
    else its groups have, over the same way."""

    def __init__(
        self,
        factor: Factor,
        total_steps: int,
        warmup_steps: int = 0,
        steady: bool = False,
        own: Callable[[int, int], float] | None = None,
        floor: float = 0.0,
        others: Mapping[str, Factor] | None = None,
    ) -> None:
        """`steady` where the rate never changes: what a task sets itself then stays."""
        super().__init__(factor, total_steps, warmup_steps, own, floor)
        self.steady, self.others = steady, dict(others or {})
        self._set: list[Any] = []  # the rates as they were left

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every parameter group's rate from the one it was made with, for the update that
        follows `step` updates. Raises RunError where somebody else sets it as well."""
        groups = optimizer.param_groups
        if self._set and set_by_others(optimizer, self._set):
            raise RunError(
                f"the learning rate was changed between steps, to {groups[0].get('lr')}, but "
                "OPTIM.SCHEDULE, OPTIM.WARMUP or the task's schedule set it before each step. To "
                'set it elsewhere, take OPTIM.SCHEDULE constant, OPTIM.WARMUP "" and no schedule.'
            )
        for key, factor in self.others.items():
            for group in groups:
                set_value(group, key, factor(self.share(step)))
        if self.steady:  # whoever sets them may
            groups = [group for group in groups if "initial_lr" not in group]
        for group in groups:
            set_rate(group, self(step))
        if not self.steady:
            self._set = as_left(optimizer)


def build_schedule(cfg: CfgNode, task: Any, plan: Plan, phase: str = "") -> Schedule:
    """The schedule that OPTIM.* describes, over OPTIM.HORIZON or TRAIN.DURATION, or that of the
    task where it has one, after OPTIM.WARMUP; of its dict's, where it returns one, that for the
    `phase`."""
    own = own_schedule(task, phase)
    rate = course(cfg, plan.steps_per_epoch, own)
    steady = cfg.OPTIM.SCHEDULE == "constant" and not rate.warmup_steps and own is None
    parts = rate.factor, rate.total_steps, rate.warmup_steps, steady, own, rate.floor
    return Schedule(*parts, others(cfg))
