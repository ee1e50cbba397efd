"""A task that sets logging up as its author likes it, twice, and speaks on every rank and in its
loader workers. Its log files go to the folder LAUNCHER_TEST_LOGS."""

from __future__ import annotations

import logging
import logging.config
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task

FORMAT = "theirs %(levelname)s %(message)s"
logging.basicConfig(level=logging.INFO, format=FORMAT)


def set_up() -> None:
    """All loggers that exist are disabled by it."""
    path = Path(os.environ["LAUNCHER_TEST_LOGS"]) / f"rank{os.environ['RANK']}.log"
    file = {"class": "logging.FileHandler", "formatter": "f", "filename": str(path)}
    console = {"class": "logging.StreamHandler", "formatter": "f"}
    logging.config.dictConfig(
        {
            "version": 1,
            "formatters": {"f": {"format": FORMAT}},
            "handlers": {"file": file, "console": console},
            "root": {"level": "INFO", "handlers": ["file", "console"]},
        }
    )


class Samples(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        logger = logging.getLogger("author.data")
        logger.info("sample %d is read", index)
        if index % 10 == 0:
            logger.error("sample %d is odd", index)
        return torch.full((4,), float(index)), torch.zeros(1)


class Speaks(Task):
    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        logging.getLogger("author").info("before my own set-up")
        set_up()
        logging.getLogger("author.task").info("after my own set-up")

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def build_dataset(self, split: str) -> Dataset:
        return Samples(40 if split == "train" else 12)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        logging.disable(logging.WARNING)  # as a library may do
        x, y = batch
        return {"loss": nn.functional.mse_loss(model(x), y)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"loss": (model(x) - y).square().mean(1)}
