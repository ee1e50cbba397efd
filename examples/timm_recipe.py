"""The training recipe of timm, after train.py of github.com/huggingface/pytorch-image-models.

Kept: AdamW without decay for 1-d weights and by layer decayed rates, random augmentation, mixup and
cutmix with soft, smoothed targets that end some epochs before the run does, random erasing, cosine
with warm-up, clipping, an averaged model evaluated beside the raw one, top-1 and top-5.
Smaller: scikit-learn's 8x8 digits and a residual net of three blocks, written here.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, one_hot
from torch.utils.data import Dataset, TensorDataset

from launcher import CfgNode, Task

MEAN, STD = 0.3, 0.38


class Augmented(Dataset):
    """Images augmented one by one, and mixed with each other in their batch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, cfg: CfgNode) -> None:
        self.images, self.labels, self.cfg = images, labels, cfg

    def set_epoch(self, epoch: int) -> None:
        self.mixes = epoch < self.cfg.MIXUP_OFF_EPOCH

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two operations drawn as RandAugment draws them, of a strength about MAGNITUDE."""
        image, theta = self.images[index], torch.eye(2, 3)
        for name in random.sample(["turn", "shear", "move", "zoom", "contrast", "brightness"], 2):
            by = random.gauss(self.cfg.MAGNITUDE, 0.05) * random.choice([-1, 1])
            if name == "turn":
                turn = torch.tensor([[math.cos(by), -math.sin(by)], [math.sin(by), math.cos(by)]])
                theta = turn @ theta
            elif name == "shear":
                theta[0, 1] += by
            elif name == "move":
                theta[random.randrange(2), 2] += by
            elif name == "zoom":
                theta[:, :2] *= 1 + by
            elif name == "contrast":
                image = (image - image.mean()) * (1 + by) + image.mean()
            else:
                image = image * (1 + by)
        places = affine_grid(theta[None], [1, 1, 8, 8], align_corners=False)
        image = grid_sample(image[None], places, align_corners=False)[0]
        return image.clamp(0, 1), self.labels[index]

    def collate(self, samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and soft targets: each sample is mixed with its counterpart from the other end."""
        images, labels = (torch.stack(part) for part in zip(*samples, strict=True))
        smooth, share = self.cfg.SMOOTHING, 1.0
        targets = one_hot(labels, 10) * (1 - smooth) + smooth / 10
        if self.mixes and random.random() < 0.5:
            share = np.random.beta(self.cfg.MIXUP, self.cfg.MIXUP)
            images = images * share + images.flip(0) * (1 - share)
        elif self.mixes:
            top, left, height, width = box(1 - np.random.beta(self.cfg.CUTMIX, self.cfg.CUTMIX))
            place = ..., slice(top, top + height), slice(left, left + width)
            images[place] = images.flip(0)[place]
            share = 1 - height * width / 64
        for image in images:
            if random.random() < self.cfg.ERASE:
                top, left, height, width = box(random.uniform(0.02, 1 / 3))
                image[:, top : top + height, left : left + width].normal_(MEAN, STD)
        return (images - MEAN) / STD, targets * share + targets.flip(0) * (1 - share)


def box(share: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box with about this share of an image."""
    height = width = min(8, round(8 * math.sqrt(share)))
    return random.randint(0, 8 - height), random.randint(0, 8 - width), height, width


class Block(nn.Module):
    """A basic block of a residual net."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(inside, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Recipe(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        mixed = {"SMOOTHING": 0.1, "MIXUP": 0.2, "CUTMIX": 1.0, "MIXUP_OFF_EPOCH": 1000}
        return CfgNode({**mixed, "MAGNITUDE": 0.2, "ERASE": 0.25, "LAYER_DECAY": 0.8})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "top1", "top5"]

    def build_model(self) -> nn.Module:
        """Its layers are numbered, as layer decay needs."""
        stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        return nn.Sequential(stem, Block(16, 32, 2), Block(32, 64, 2), head)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A group for each layer and for what decays of it; rates rise up to the head's."""
        optim = self.cfg.OPTIM
        groups: dict[Any, list[torch.Tensor]] = {}
        for name, weight in model.named_parameters():
            groups.setdefault((int(name.split(".")[0]), weight.ndim > 1), []).append(weight)
        made = [
            {
                "params": weights,
                "lr_scale": self.cfg.TASK.LAYER_DECAY ** (len(model) - 1 - layer),
                "weight_decay": optim.WEIGHT_DECAY if decays else 0.0,
            }
            for (layer, decays), weights in groups.items()
        ]
        return torch.optim.AdamW(made, lr=optim.LR, betas=tuple(optim.BETAS), eps=optim.EPS)

    def build_dataset(self, split: str) -> Dataset:
        digits = load_digits()
        parts = train_test_split(
            digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
        )
        images, labels = map(torch.as_tensor, parts[split == "val" :: 2])
        images = images.float().unsqueeze(1) / 16
        if split == "train":
            return Augmented(images, labels, self.cfg.TASK)
        return TensorDataset((images - MEAN) / STD, labels)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, targets = batch
        if self.recorder.step % self.run.steps_per_epoch == 1:
            self.recorder.image("batch", (images * STD + MEAN).clamp(0, 1))
        return {"loss": cross_entropy(model(images), targets)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        best = logits.topk(5).indices == labels.unsqueeze(1)
        loss = cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "top1": best[:, 0], "top5": best.any(1)}
