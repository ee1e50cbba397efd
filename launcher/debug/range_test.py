"""The learning rate range test (Smith, "Cyclical learning rates for training neural networks", WACV
2017): a few steps of the run itself, each at a higher rate than the one before."""

from __future__ import annotations

import math
from typing import Any

from launcher.callbacks import Run
from launcher.errors import UsageError

# A loss this many times farther above the best than that is from the first one, or from 0.
DIVERGED = 4.0
SMOOTHING = 0.8


class RangeTest:
    """A callback that is the schedule of the run, and ends it where the loss has diverged.

    `curve` gets, on rank 0, each rate of the first parameter group with the loss after the update
    at it; the others' rates rise with it.
    """

    def __init__(self, run: Run, low: float, high: float, steps: int, curve: list[Any]) -> None:
        if len(run.optimizers) > 1 or "" not in run.optimizers:
            raise UsageError(
                f"the task has the phases {', '.join(run.optimizers)}, whose losses depend on each "
                "other's rates: one curve tells nothing of them. Give find-lr a task whose "
                "build_optimizer returns one of them alone, with the others' weights at rest."
            )
        groups = run.optimizers[""].param_groups
        rate = groups[0].get("lr")
        base = 0.0 if rate is None else float(rate) * groups[0].get("lr_scale", 1.0)
        if base <= 0:
            raise UsageError(
                "the first parameter group of the task's optimiser has no rate above 0 to start "
                "from: there is nothing to raise. Give it one in build_optimizer."
            )
        self.run, self.low, self.high, self.steps = run, low, high, steps
        self.base, self.curve = base, curve
        self.rate: float | None = None  # of the update that the next loss comes after
        self.begun, self.average, self.weight = 0, 0.0, 0.0
        self.first = self.best = math.inf
        self.reason = "the loss has diverged"
        run.task.schedule = self.factor

    def factor(self, step: int, total: int) -> float:
        """The rate rises by the same factor each step."""
        done = min(step / max(self.steps - 1, 1), 1.0)
        return self.low * (self.high / self.low) ** done / self.base

    def before_step(self, samples: int) -> str | None:
        self.begun += 1
        # In fp16 a step whose gradients are not finite is skipped, for ever once the weights are.
        return "finish" if self.begun > 2 * self.steps + 20 else None

    def on_record(self, record: dict[str, Any] | None) -> str | None:
        if record is None:
            return None
        loss, rate = float(record["train/loss"]), float(record["train/lr"])
        if self.rate is not None:
            self.curve.append((self.rate, loss))
        self.rate = rate
        return "finish" if self._diverged(loss) else None

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        self.average = SMOOTHING * self.average + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + 1 - SMOOTHING
        smoothed = self.average / self.weight
        self.first = smoothed if math.isinf(self.first) else self.first
        self.best = min(self.best, smoothed)
        return smoothed - self.best > DIVERGED * max(self.first - self.best, abs(self.best))
