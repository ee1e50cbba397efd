"""Tasks for whole runs over data sets that tell in the records what was asked of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task
from launcher.datasets import Mixture

# A step in whose train_step the run breaks off.
FAIL_AT = "LAUNCHER_TEST_DATA_FAIL_AT"
LENGTH = 21


class Told(Dataset):
    """A sample is its index, the epoch that it was told, and noise of `set_epoch`'s own."""

    def __init__(self, first: int = 0, length: int = LENGTH) -> None:
        self.first, self.length = first, length

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.noise = epoch, torch.rand(()).item()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([self.first + index, self.epoch, self.noise])


class Quiet(Told):
    """Draws nothing, as is asked of a mixture's."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.noise = epoch, epoch / 7


def mixed() -> Mixture:
    """Of two of them; the second's samples start at 100."""
    return Mixture([Quiet(0, 7), Quiet(100, 5)], [2, 1], LENGTH, seed=3)


class Data(Task):
    """Records what the batches hold: the mean of the indices, of the epochs and of the noise."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"SHARED": False, "MIXED": False})

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def build_dataset(self, split: str) -> Any:
        if self.cfg.TASK.SHARED and hasattr(self, "only"):
            return self.only
        self.only = mixed() if self.cfg.TASK.MIXED else Told()
        return self.only

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if self.recorder.step == int(os.environ.get(FAIL_AT, "-1")):
            raise RuntimeError("broken off")
        index, told, noise = batch.mean(0)
        loss = (model(batch / 50) ** 2).mean()
        return {"loss": loss, "index": index, "told": told, "noise": noise}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": model(batch / 50).squeeze(1) ** 2, "told": batch[:, 1]}
