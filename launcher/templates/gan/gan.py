"""Two networks that train each other: a generator draws rings, a discriminator tells them apart.

For your own images: let `build_dataset` return them, with values from 0 to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize, softplus
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task
from launcher.tasks.pictures import grid

SIZE = 12  # pixels, of an image's side, a multiple of 4


def rings(count: int, seed: int) -> torch.Tensor:
    """Images of shape (count, 1, SIZE, SIZE), each a ring somewhere: the same for every SEED."""
    random = torch.Generator().manual_seed(seed)
    radius, y, x = torch.rand(3, count, 1, 1, generator=random)
    axis = torch.arange(SIZE) + 0.5
    down = axis.view(1, -1, 1) - (4.5 + 3 * y)
    across = axis.view(1, 1, -1) - (4.5 + 3 * x)
    away = (down**2 + across**2).sqrt() - (2 + 1.5 * radius)
    return torch.exp(-(away**2)).unsqueeze(1)


class Gan(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"NOISE": 16, "WIDTH": 24, "SAMPLES": 2000})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["distance"]

    def build_model(self) -> nn.Module:
        noise, width, corner = self.cfg.TASK.NOISE, self.cfg.TASK.WIDTH, SIZE // 4
        generator = nn.Sequential(
            nn.Linear(noise, 2 * width * corner**2, bias=False),
            nn.Unflatten(1, (2 * width, corner, corner)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * corner**2, 1),
            nn.Flatten(0),
        )
        return nn.ModuleDict({"generator": generator, "discriminator": discriminator})

    def build_optimizer(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        """Each is a phase; a step has them in this order, on the same batch."""
        rate, betas = self.cfg.OPTIM.LR, tuple(self.cfg.OPTIM.BETAS)
        return {
            phase: torch.optim.Adam(model[phase].parameters(), rate, betas)
            for phase in ("discriminator", "generator")
        }

    def build_dataset(self, split: str) -> TensorDataset:
        if split == "train":
            return TensorDataset(rings(self.cfg.TASK.SAMPLES, seed=0))
        return TensorDataset(rings(500, seed=1))

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, torch.Tensor]:
        """The loss of one phase. Nothing has to be detached: in each phase the launcher switches
        the gradients of the other network off."""
        (real,) = batch
        false = model["discriminator"](self.draw(model, len(real)))
        if phase == "generator":
            return {"loss": softplus(-false).mean()}
        true = model["discriminator"](real)
        right = (true > 0).float().mean() / 2 + (false < 0).float().mean() / 2
        return {"loss": (softplus(-true) + softplus(false)).mean(), "right": right}

    def draw(self, model: Any, count: int) -> torch.Tensor:
        noise = torch.randn(count, self.cfg.TASK.NOISE, device=self.run.device)
        return model["generator"](noise)

    def eval_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        (real,) = batch
        return {"real": real.flatten(1), "false": self.draw(model, len(real)).flatten(1)}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """How far drawn images are from held-out ones: the sliced Wasserstein distance, a mean over
        random directions. What an evaluation draws is seeded, so it is the same at any time."""
        directions = normalize(torch.randn(SIZE * SIZE, 100), dim=0)
        real, false = ((outputs[name] @ directions).sort(0).values for name in ("real", "false"))
        return {"distance": float((real - false).abs().mean())}

    def show(self, model: Any) -> None:
        self.recorder.image("samples", grid(self.draw(model, 64)))
