"""A warning where MODEL.COMPILE compiles nothing, for the task never calls what it would."""

from __future__ import annotations

from torch._dynamo.utils import counters

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)


class Compiled:
    def __init__(self, run: Run) -> None:
        self.looked = False

    def on_step(self) -> None:
        if not self.looked and not counters["stats"]["unique_graphs"]:
            logger.warning(
                "MODEL.COMPILE is True, but nothing was compiled: train_step does not call the "
                "model that build_model returns, or one that its nn.ModuleDict or nn.ModuleList "
                "holds. Call it as model(...), or compile in build_model: module.compile()."
            )
        self.looked = True
