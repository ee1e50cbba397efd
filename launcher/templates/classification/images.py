"""Which shape is on a small grey image? One network, one loss, random augmentation.

For your own images: let `build_dataset` return your data set, and `build_model` your model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from launcher import CfgNode, Task

CLASSES = ("disc", "ring", "square", "cross")


class Shapes(Dataset):
    """Drawn images of shape (1, size, size), which stand for files on a disk: the same for every
    SEED. In training an image is mirrored at random; the launcher seeds that by epoch and sample.
    """

    def __init__(self, split: str, count: int, size: int) -> None:
        self.mirrors = split == "train"
        random = torch.Generator().manual_seed(0 if split == "train" else 1)

        def draw(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(count, 1, 1, generator=random)

        self.labels = torch.randint(len(CLASSES), (count,), generator=random)
        rows, columns = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
        radius = draw(size / 6, size / 3.5)
        # How far each pixel is from the centre, in radii.
        down, across = (
            ((axis - draw(size / 3, size / 1.5)) / radius).abs() for axis in (rows, columns)
        )
        far, near = torch.maximum(down, across), torch.minimum(down, across)
        round_ = (down**2 + across**2).sqrt()
        shapes = [round_ < 1, (round_ < 1) & (round_ > 0.5), far < 0.8, (far < 1) & (near < 0.3)]
        inside = torch.stack(shapes)[self.labels, torch.arange(count)]
        noise = 0.1 * torch.randn(count, size, size, generator=random)
        self.images = (draw(0, 0.3) + draw(0.3, 0.7) * inside + noise).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        for axis in (1, 2) if self.mirrors else ():
            if torch.rand(()) < 0.5:
                image = image.flip(axis)
        return image, self.labels[index]


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Images(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 16, "SIZE": 20, "SAMPLES": 4000})  # become TASK.WIDTH, ...

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "accuracy"]

    def build_model(self) -> nn.Module:
        width = self.cfg.TASK.WIDTH
        return nn.Sequential(
            convolution(1, width),
            convolution(width, 2 * width),
            convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, len(CLASSES)),
        )

    def build_dataset(self, split: str) -> Dataset:
        count = self.cfg.TASK.SAMPLES if split == "train" else 500
        return Shapes(split, count, self.cfg.TASK.SIZE)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """One value a sample: the launcher takes the means, over all ranks."""
        images, labels = batch
        logits = model(images)
        loss = cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(1) == labels}
