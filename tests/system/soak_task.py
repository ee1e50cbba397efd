"""Steps as small as can be, and what the process holds as they go by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task


class Soak(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"HELD": "", "EVERY": 1000})

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def build_dataset(self, split: str) -> TensorDataset:
        return TensorDataset(torch.randn(512, 2), torch.randn(512, 1))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = batch
        self.recorder.scalar("seen", len(x))
        return {"loss": nn.functional.mse_loss(model(x), y)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"loss": (model(x) - y).square().mean(1)}

    def on_step(self) -> None:
        if self.run.rank == 0 and self.run.progress.step % self.cfg.TASK.EVERY == 0:
            process = psutil.Process()
            held = {
                "step": self.run.progress.step,
                "bytes": process.memory_info().rss,
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
                "children": len(process.children(recursive=True)),
            }
            with Path(self.cfg.TASK.HELD).open("a") as file:
                file.write(json.dumps(held) + "\n")
