"""Sine and cosine series: a regression task on tensors that needs no files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.errors import UsageError
from launcher.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn


class Sine(Task):
    """The next (sin, cos) of a series from a window of its last values, with noise on them.

    Each sample has a phase and a frequency of its own, so the model must read the frequency off
    the window. `loss` is the mean squared error to the series without noise, `mae` the mean
    absolute error.
    """

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode(
            {
                "WINDOW": 16,  # values that the model sees
                "WIDTH": 64,  # of the hidden layers
                "FREQUENCY": 0.1,  # the highest, in cycles a value; the lowest is a tenth of it
                "NOISE": 0.02,  # standard deviation
                "TRAIN_SAMPLES": 8192,
                "VAL_SAMPLES": 1024,
            }
        )

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "mae"]

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        for name in ("WINDOW", "WIDTH", "TRAIN_SAMPLES", "VAL_SAMPLES"):
            if cfg.TASK[name] < 1:
                raise UsageError(f"TASK.{name} must be at least 1, not {cfg.TASK[name]}")
        if cfg.TASK.FREQUENCY <= 0 or cfg.TASK.NOISE < 0:
            raise UsageError("TASK.FREQUENCY must be above 0 and TASK.NOISE at least 0")

    def build_model(self) -> nn.Module:
        """From windows of shape (B, WINDOW, 2) to the next values, shape (B, 2)."""
        from torch import nn

        width = self.cfg.TASK.WIDTH
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * self.cfg.TASK.WINDOW, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 2),
        )

    def build_dataset(self, split: str) -> Any:
        """Windows of shape (N, WINDOW, 2) and the values after them, shape (N, 2)."""
        import torch
        from torch.utils.data import TensorDataset

        task = self.cfg.TASK
        count = task.TRAIN_SAMPLES if split == "train" else task.VAL_SAMPLES
        # A generator of its own: the data are the same for every SEED, rank and restart.
        random = torch.Generator().manual_seed(0 if split == "train" else 1)
        phase = torch.rand(count, 1, generator=random)
        frequency = task.FREQUENCY * (0.1 + 0.9 * torch.rand(count, 1, generator=random))
        angle = 2 * math.pi * (phase + frequency * torch.arange(task.WINDOW + 1))
        series = torch.stack([angle.sin(), angle.cos()], dim=2)
        windows, following = series[:, :-1], series[:, -1].clone()
        noise = task.NOISE * torch.randn(windows.shape, generator=random)
        return TensorDataset(windows + noise, following)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        windows, following = batch
        error = model(windows) - following
        return {"loss": error.square().mean(), "mae": error.abs().mean()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        windows, following = batch
        error = model(windows) - following
        return {"loss": error.square().mean(1), "mae": error.abs().mean(1)}
