"""A task with everything that a resume may get wrong: dropout, random augmentation, buffers,
and a model of several gradient buckets (DDP's first one holds 1 MiB).

LAUNCHER_TEST_SLEEP: seconds that every train_step takes longer; EVAL_SLEEP and BUILD_SLEEP likewise
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from launcher import CfgNode, Task
from tests.system.leash import obey

SLEEP = float(os.environ.get("LAUNCHER_TEST_SLEEP", "0"))
EVAL_SLEEP = float(os.environ.get("LAUNCHER_TEST_EVAL_SLEEP", "0"))


class Noisy(torch.utils.data.Dataset):
    """Samples with noise from all three generators."""

    def __init__(self, length: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 32, generator=draw)
        self.y = (self.x[:, :4].sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(32) * 0.1 + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return self.x[index] + noise, self.y[index]


class Centre(nn.Module):
    """Takes off a running mean: a buffer that the forward pass changes, also for one sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Exact(Task):
    """A classifier of 32 features with 670,000 weights."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 640, "SAMPLES": 52})

    def build_model(self) -> nn.Module:
        time.sleep(float(os.environ.get("LAUNCHER_TEST_BUILD_SLEEP", "0")))
        width = self.cfg.TASK.WIDTH
        return nn.Sequential(
            nn.Linear(32, width),
            Centre(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width // 3),
            nn.ReLU(),
            nn.Linear(width // 3, 2),
        )

    def build_dataset(self, split: str) -> Noisy:
        return Noisy(self.cfg.TASK.SAMPLES if split == "train" else 17, 1 + (split == "val"))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        obey(self.recorder.step)
        x, y = batch
        time.sleep(SLEEP)
        # Random draws of the step itself, on top of dropout.
        loss = nn.functional.cross_entropy(model(x + 0.01 * torch.randn_like(x)), y)
        return {"loss": loss, "coin": torch.tensor(random.random() + float(np.random.rand()))}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        time.sleep(EVAL_SLEEP)
        x, y = batch
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(1) == y}
