"""A line to be fitted, whose train_step does at a step what a test has put down for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task

X = torch.linspace(-1, 1, 24).unsqueeze(1)
Y = 3 * X + torch.sin(5 * X)


class Line(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"AT": 0, "DO": "", "RANK": 0, "SCALE": 1.0})

    def build_model(self) -> nn.Module:
        self._act("build")
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, -0.25)
        return model

    def build_dataset(self, split: str) -> TensorDataset:
        if self.cfg.TASK.DO == "empty":
            return TensorDataset(X[:0], Y[:0])
        return TensorDataset(X, self.cfg.TASK.SCALE * Y)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if self.recorder.step == self.cfg.TASK.AT and self.run.rank == self.cfg.TASK.RANK:
            self._act("step")
        x, y = batch
        return {"loss": nn.functional.mse_loss(model(x), y)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        return {"loss": (model(x) - y).square().squeeze(1)}

    def _act(self, at: str) -> None:
        """What TASK.DO says: "step fail", "build int" and the like."""
        where, _, what = self.cfg.TASK.DO.partition(" ")
        if where != at:
            return
        if what == "fail":
            raise ZeroDivisionError("by hand")
        if what == "hang":
            time.sleep(60)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "ask parent":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(1.0)
        if what in ("int", "term"):
            os.kill(os.getpid(), signal.SIGINT if what == "int" else signal.SIGTERM)
        if what == "int twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5.5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
