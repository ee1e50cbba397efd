"""A variational autoencoder, after vae/main.py of pytorch/examples.

Kept: two linear layers each way, binary cross-entropy and Kullback-Leibler divergence summed over
an image, Adam at 1e-3, reconstructions and samples after every evaluation. Smaller: scikit-learn's
8x8 digits for MNIST, 128 hidden units for 400, 10 latent ones for 20. The original's loss is the
batch's sum and here its mean, as everywhere in the launcher: to Adam a constant factor is nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task
from launcher.tasks.pictures import grid


class Autoencoder(nn.Module):
    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits of the pixels, and the mean and log variance of the latent units."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(latent), mean, log_variance


class Vae(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"HIDDEN": 128, "LATENT": 10})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "reconstruction", "divergence"]

    def build_model(self) -> nn.Module:
        return Autoencoder(self.cfg.TASK.HIDDEN, self.cfg.TASK.LATENT)

    def build_dataset(self, split: str) -> TensorDataset:
        parts = train_test_split(load_digits().data, test_size=0.2, random_state=0)
        return TensorDataset(torch.tensor(parts[split == "val"], dtype=torch.float32) / 16)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        (images,) = batch
        return {name: values.mean() for name, values in losses(images, *model(images)).items()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        # What the model draws here the launcher seeds by the batch.
        (images,) = batch
        logits, mean, log_variance = model(images)
        # Of the split's first batch: the first picture of a name and step counts.
        self.recorder.image(
            "reconstruction", pictures(torch.cat([images[:8], logits[:8].sigmoid()]))
        )
        return losses(images, logits, mean, log_variance)

    def show(self, model: Any) -> None:
        latent = torch.randn(64, self.cfg.TASK.LATENT, device=self.run.device)
        self.recorder.image("sample", pictures(model.decoder(latent).sigmoid()))


def losses(
    images: torch.Tensor, logits: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The negative evidence lower bound of each image, and its two parts."""
    pixels = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
    reconstruction = pixels.sum(1)
    # Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, appendix B.
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    return {
        "loss": reconstruction + divergence,
        "reconstruction": reconstruction,
        "divergence": divergence,
    }


def pictures(pixels: torch.Tensor) -> torch.Tensor:
    return grid(pixels.view(-1, 1, 8, 8))
