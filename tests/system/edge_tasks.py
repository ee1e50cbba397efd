"""Tasks of which ranks could come apart."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from launcher import Task


class Plain(Task):
    """Nine samples: with batches of eight, the last one leaves all ranks but the first idle."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.ModuleDict({"body": nn.Linear(4, 1), "spare": nn.Linear(4, 1)})

    def build_dataset(self, split: str) -> Dataset:
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": nn.functional.mse_loss(model["body"](batch[0]), batch[1])}


class Apart(Plain):
    """One rank moves a weight by itself."""

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(4, 1)})

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        if os.environ.get("RANK") == "1" and self.recorder.step == 3:
            with torch.no_grad():
                model["body"].weight[0, 3] += 1e-3
        return super().train_step(model, batch)


class Gathers(Apart):
    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        count = torch.ones(1)
        dist.all_reduce(count)
        return super().train_step(model, batch)


class Collects(Apart):
    """Exchanges what it was given already, as torchmetrics does by default."""

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": (model["body"](batch[0]) - batch[1]).square().squeeze(1)}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        found = [torch.zeros(1) for _ in range(dist.get_world_size())]
        dist.all_gather(found, outputs["loss"].sum().reshape(1))
        return {"sum": sum(found)}


class Buffered(Plain):
    """Ranks write other values into two buffers, of which the task shares one."""

    shared_buffers = ("*.ours",)

    def build_model(self) -> nn.Module:
        model = super().build_model()
        for name in ("mine", "ours"):
            model["body"].register_buffer(name, torch.zeros(()))
        return model

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        for buffer in (model["body"].mine, model["body"].ours):
            buffer += 1 + int(os.environ.get("RANK", 0))
        return super().train_step(model, batch)


class Grows(Apart):
    """Its model becomes another while it trains."""

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        model["body"].register_buffer("seen", torch.zeros(self.recorder.step))
        if self.recorder.step == 2:
            model["late"] = nn.Linear(4, 1)
        return super().train_step(model, batch)
