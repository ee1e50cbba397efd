"""The learning rate is lowered where a metric has stopped getting better."""

from __future__ import annotations

from launcher.callbacks import Run
from launcher.callbacks.watched import Watched, is_number
from launcher.edges.optimizer import rescale
from launcher.log import get_logger

logger = get_logger(__name__)


class Plateau(Watched):
    """Multiplies all rates by `factor` after more than `patience` evaluations (or records, for
    train/...) in which the metric has not got better, as torch's ReduceLROnPlateau does with
    threshold_mode "abs" (least_change) and min_lr (lowest).

    What it multiplies is what the schedule goes from: a decay or a warm-up goes on, from there.
    """

    least_patience = 0

    def __init__(
        self,
        run: Run,
        metric: str = "val/loss",
        factor: float = 0.1,
        patience: int = 3,
        mode: str = "min",
        least_change: float = 0.0,
        lowest: float = 0.0,
    ) -> None:
        """`lowest` is for the rate that the schedule goes from."""
        super().__init__(run, metric, patience, mode, least_change)
        right = is_number(factor) and 0 < factor < 1
        self.require(right, "factor", factor, "a number between 0 and 1")
        self.require(is_number(lowest, 0), "lowest", lowest, "a number, not < 0")
        self.factor, self.lowest = factor, lowest

    def saw(self, value: float) -> None:
        if self.waited <= self.patience:
            return
        times = f"{self.waited} {self.what}{'s' if self.waited > 1 else ''}"
        logger.info(
            "%s %.6g has not got better for %s: learning rate times %g",
            *(self.metric, self.best, times, self.factor),
        )
        self.waited = 0
        for optimizer in self.run.optimizers.values():
            rescale(optimizer, self.factor, self.lowest)
