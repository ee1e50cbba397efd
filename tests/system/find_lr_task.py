"""Tasks whose stable rate is known: a bowl, and variations on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task

START = 3.0


class Bowl(Task):
    """The loss is A / 2 (w - x)^2: plain gradient descent is stable below 2 / A."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"A": 4.0, "NOISE": 0.0})

    def build_model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, START)
        return model

    def build_dataset(self, split: str) -> TensorDataset:
        drawn = torch.randn(64, generator=torch.Generator().manual_seed(1))
        return TensorDataset(1 + self.cfg.TASK.NOISE * drawn)

    def train_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        (x,) = batch
        return {"loss": (0.5 * self.cfg.TASK.A * (model.weight.squeeze() - x) ** 2).mean()}


class Flat(Bowl):
    """The loss is noise: no rate makes it fall."""

    def train_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": (model.weight.squeeze() * 0.0 + batch[0]).mean()}


class Own(Bowl):
    """With an optimiser and a schedule of its own, and a second group at half the rate."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(super().build_model(), nn.Linear(1, 1))

    def build_optimizer(self, model: Any) -> Any:
        groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.01}]
        return torch.optim.SGD(groups, 0.02)

    def schedule(self, step: int, total: int) -> float:
        return 0.125

    def train_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        found = super().train_step(model[0], batch)
        return {"loss": found["loss"] + 0.0 * model[1].weight.sum() + 0.0 * model[1].bias.sum()}


class Phased(Own):
    def build_optimizer(self, model: Any) -> Any:
        return {name: torch.optim.SGD(model[i].parameters(), 0.1) for i, name in enumerate("ab")}

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, torch.Tensor]:
        return super().train_step(model, batch)


Phased.schedule = None  # type: ignore[assignment]
