"""Whether a task can learn a few batches by heart, the first test of a new one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
NEAR_ZERO = 0.05  # of the first record's loss


class Overfit:
    """Says at the end how the training loss went, with DEBUG.OVERFIT_BATCHES; on rank 0."""

    def __init__(self, run: Run) -> None:
        self.batches = run.cfg.DEBUG.OVERFIT_BATCHES
        self.first = dict[str, float]()  # of each loss; several with phases
        self.last = dict[str, float]()

    def on_start(self) -> None:
        logger.warning(
            "DEBUG.OVERFIT_BATCHES: trains on the same %d global batch%s again and again, and "
            "evaluates on them",
            *(self.batches, "es" if self.batches > 1 else ""),
        )

    def on_record(self, record: Mapping[str, Any] | None) -> None:
        losses = {k: v for k, v in (record or {}).items() if k.startswith("train/loss")}
        self.first = {**losses, **self.first}
        self.last |= losses

    def on_end(self) -> None:
        for key, first in self.first.items():
            last = self.last[key]
            if not math.isfinite(last):
                told = "is not finite: lower OPTIM.LR, and set DEBUG.NONFINITE stop"
            elif abs(last) <= NEAR_ZERO * abs(first):
                told = "near zero: the task learns the batches by heart, as it should"
            elif last < first:
                told = (
                    "NOT near zero: train for longer (TRAIN.DURATION), or with another OPTIM.LR, "
                    "without weight decay, dropout and augmentation. A loss that stays where it "
                    "is tells of labels, a loss or gradients that are wrong"
                )
            else:
                told = "no lower than at the start: the task does not learn. Does the loss reach "
                told += "the weights, and the optimiser hold them? Is OPTIM.LR too high?"
            told = f"{key} of the same batches went from {first:.4g} to {last:.4g}: {told}"
            logger.warning("DEBUG.OVERFIT_BATCHES: %s", told)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.last = dict(state["first"]), dict(state["last"])
