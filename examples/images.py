"""Image classification with a residual network, after imagenet/main.py of pytorch/examples.

Kept: SGD with momentum and weight decay, the rate divided by ten at every third of the run, random
crops in training alone, normalised channels, top-1 and top-5 accuracy, the best checkpoint by
top-1. Smaller: scikit-learn's 8x8 digits for ImageNet, two residual blocks for ResNet-18, 12
epochs for 90. Digits are not mirrored.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from launcher import CfgNode, Task


class Digits(Dataset):
    """In training each image is cut out of its padded self at a random place, which the launcher
    seeds by epoch and sample."""

    def __init__(self, split: str, padding: int) -> None:
        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0)
        pixels, labels = parts[split == "val" :: 2]
        images = torch.tensor(pixels, dtype=torch.float32).unsqueeze(1) / 16
        self.labels = torch.tensor(labels)
        self.padding = padding if split == "train" else 0
        self.images = F.pad((images - 0.305) / 0.376, [self.padding] * 4, value=-0.305 / 0.376)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        return self.images[index, :, top : top + 8, left : left + 8], self.labels[index]


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride)
        self.second = convolution(outputs, outputs)
        self.shortcut = nn.Identity() if stride == 1 else convolution(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class ImageClassification(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 16, "PADDING": 1})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "acc1", "acc5"]

    def build_model(self) -> nn.Module:
        width = self.cfg.TASK.WIDTH
        return nn.Sequential(
            convolution(1, width),
            nn.ReLU(),
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )

    def build_dataset(self, split: str) -> Dataset:
        return Digits(split, self.cfg.TASK.PADDING)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        correct = hits(logits, labels)
        means = {name: values.float().mean() for name, values in correct.items()}
        return {"loss": F.cross_entropy(logits, labels), **means}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), **hits(logits, labels)}


def hits(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whether each label is the likeliest class, or one of the five likeliest."""
    found = logits.topk(5).indices == labels.unsqueeze(1)
    return {"acc1": found[:, 0], "acc5": found.any(1)}
