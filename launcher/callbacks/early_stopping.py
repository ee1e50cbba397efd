"""A run is complete where a metric has stopped getting better, or will not come back."""

from __future__ import annotations

import math

from launcher.callbacks import Run
from launcher.callbacks.watched import Watched, is_number


class EarlyStopping(Watched):
    """Completes the run after `patience` evaluations (or records, for train/...) in which the
    metric has not got better; at once where it has passed `diverged` in the wrong direction, or is
    not finite."""

    def __init__(
        self,
        run: Run,
        metric: str = "val/loss",
        patience: int = 3,
        mode: str = "min",
        least_change: float = 0.0,
        diverged: float | None = None,
        nonfinite: bool = True,
    ) -> None:
        """`nonfinite` False: a value that is not finite is one that is no better."""
        super().__init__(run, metric, patience, mode, least_change)
        fine = diverged is None or is_number(diverged)
        self.require(fine, "diverged", diverged, "a number")
        self.require(isinstance(nonfinite, bool), "nonfinite", nonfinite, "true or false")
        self.diverged, self.nonfinite, self.reason = diverged, nonfinite, ""

    def saw(self, value: float) -> str | None:
        if self.nonfinite and not math.isfinite(value):
            self.reason = f"{self.metric} is {value}"
        elif self.diverged is not None and self.sign * value < self.sign * self.diverged:
            self.reason = f"{self.metric} {value:.6g} is past {self.diverged:.6g}"
        elif self.waited >= self.patience:
            times = f"{self.waited} {self.what}{'s' if self.waited > 1 else ''}"
            self.reason = f"{self.metric} {self.best:.6g} has not got better for {times}"
        else:
            return None
        return "finish"
