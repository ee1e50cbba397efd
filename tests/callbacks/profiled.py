"""A task whose parts take known times, and a callback with a clock of its own beside them."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task

# Seconds that a micro-batch (`data`: each of its four samples) or an optimiser takes longer.
SLEEPS = {"data": 0.01, "forward": 0.03, "backward": 0.05, "optimiser": 0.02}
LATE = 0.4  # and rank 1's forward pass


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


class Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(SLEEPS["backward"])
        return gradient


class Samples(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        time.sleep(SLEEPS["data"])
        # It moves tensors itself: that is no copy of the launcher's.
        return torch.full((4,), index / 64).to(torch.device("cpu")), torch.rand(1).to(torch.float32)


class Slow(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(SLEEPS["optimiser"])
        return super().step(closure)


class Profiled(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"PHASES": False})

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict({name: nn.Linear(4, 1) for name in ("a", "b")})

    def build_dataset(self, split: str) -> Samples:
        return Samples()

    def collate(self, samples: Any) -> Batch:
        x, y = zip(*samples, strict=True)
        return Batch(torch.stack(x), torch.stack(y))

    def build_optimizer(self, model: Any) -> Any:
        if self.cfg.TASK.PHASES:
            return {name: Slow(model[name].parameters(), 0.1) for name in ("a", "b")}
        return Slow(model.parameters(), 0.1)

    def train_step(self, model: Any, batch: Batch, phase: str = "") -> dict[str, torch.Tensor]:
        time.sleep(SLEEPS["forward"] + LATE * self.run.rank)
        out = sum(model[name](Sleeps.apply(batch.x.requires_grad_())) for name in phase or "ab")
        return {"loss": ((out - batch.y) ** 2).mean()}


class Clock:
    """Measures each step itself, and writes that down."""

    def __init__(self, run: Any) -> None:
        self.run, self.began = run, 0.0
        self.found: dict[int, float] = {}

    def before_step(self, samples: int) -> None:
        self.began = time.perf_counter()

    def on_step(self) -> None:
        self.found[self.run.progress.step] = 1e3 * (time.perf_counter() - self.began)

    def on_end(self) -> None:
        file = self.run.directory / f"clock{self.run.runtime.rank}.json"
        file.write_text(json.dumps(self.found))
