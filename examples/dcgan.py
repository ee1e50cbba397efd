"""A generative adversarial network, after dcgan/main.py of pytorch/examples.

Kept: transposed convolutions with batch-norm, normal initial weights, one update of the
discriminator and one of the generator a batch, Adam with betas (0.5, 0.999), samples from fixed
noise. Smaller: scikit-learn's 8x8 digits for 64x64 photographs, two layers fewer, a higher rate for
fewer steps. Each update draws noise of its own. New: the Fréchet distance between the pixels of
samples and of held-out digits.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task
from launcher.tasks.pictures import grid


def initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Dcgan(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"NOISE": 64, "WIDTH": 24})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["frechet"]

    def build_model(self) -> nn.Module:
        noise, width = self.cfg.TASK.NOISE, self.cfg.TASK.WIDTH
        generator = nn.Sequential(
            nn.ConvTranspose2d(noise, 2 * width, 2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        )
        discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 2, bias=False),
            nn.Flatten(0),
        )
        model = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
        return model.apply(initialise)

    def build_optimizer(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        rate, betas = self.cfg.OPTIM.LR, tuple(self.cfg.OPTIM.BETAS)
        return {
            phase: torch.optim.Adam(model[phase].parameters(), rate, betas)
            for phase in ("discriminator", "generator")
        }

    def build_dataset(self, split: str) -> TensorDataset:
        parts = train_test_split(load_digits().images, test_size=0.2, random_state=0)
        images = torch.tensor(parts[split == "val"], dtype=torch.float32).unsqueeze(1)
        return TensorDataset(images / 8 - 1)  # from -1 to 1, as the generator's

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, torch.Tensor]:
        (real,) = batch
        # In the discriminator's turn the launcher has switched the generator's gradients off.
        false = model["discriminator"](self.sample(model, len(real)))
        told = {"D_G_z": false.detach().sigmoid().mean()}
        if phase == "generator":
            return {"loss": -logsigmoid(false).mean(), **told}
        true = model["discriminator"](real)
        told["D_x"] = true.detach().sigmoid().mean()
        return {"loss": -(logsigmoid(true) + logsigmoid(-false)).mean(), **told}

    def sample(self, model: Any, count: int) -> torch.Tensor:
        noise = torch.randn(count, self.cfg.TASK.NOISE, 1, 1, device=self.run.device)
        return model["generator"](noise)

    def eval_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        (real,) = batch
        return {"real": real.flatten(1), "false": self.sample(model, len(real)).flatten(1)}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """The Fréchet distance of two normal distributions, |m - n|^2 + tr(A + B - 2 sqrt(AB))."""
        (m, a), (n, b) = (
            (x.mean(0), x.T.cov()) for x in (outputs["real"].double(), outputs["false"].double())
        )
        # AB has the eigenvalues of a positive semi-definite matrix; what rounding adds is cut off.
        roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt()
        return {"frechet": float((m - n).square().sum() + a.trace() + b.trace() - 2 * roots.sum())}

    def show(self, model: Any) -> None:
        # What this draws is the same each time, so the samples can be followed.
        self.recorder.image("samples", grid(self.sample(model, 64) / 2 + 0.5))
