"""Learning without labels from two views, after run.py of github.com/google-research/simclr.

Kept: two views of each image, a projection head, the NT-Xent loss over all ranks' views, LARS with
neither decay nor scaling for 1-d weights, warm-up and cosine, the contrastive accuracy and entropy.
Smaller: scikit-learn's 8x8 digits, a small net. Group norm instead of batch norm over all replicas.
Labels are for the evaluation alone: the nearest of a few labelled images, by the encoder's output.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize, one_hot
from torch.utils.data import Dataset, TensorDataset

from launcher import CfgNode, Task


class Views(Dataset):
    """The number of an image and two views of it, each cropped, turned and of another contrast."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.view(index), self.view(index)

    def view(self, index: int) -> torch.Tensor:
        turn, scale = random.uniform(-0.25, 0.25), random.uniform(0.8, 1.1)
        x, y = random.uniform(-0.15, 0.15), random.uniform(-0.15, 0.15)
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        places = affine_grid(
            torch.tensor([[[cos, -sin, x], [sin, cos, y]]]), [1, 1, 8, 8], align_corners=False
        )
        image = grid_sample(self.images[index, None], places, align_corners=False)[0]
        return image * random.uniform(0.7, 1.3)


class LARS(torch.optim.Optimizer):
    """SGD whose rate is scaled by each weight's norm over its update's (You et al., 2017)."""

    def __init__(self, weights: Iterable[Any], lr: float, momentum: float, decay: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": decay, "trust": 0.02}
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                update, rate = weight.grad, group["lr"]
                if weight.ndim > 1:
                    update = update + group["weight_decay"] * weight
                    ratio = group["trust"] * weight.norm() / update.norm()
                    rate = rate * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                state = self.state[weight]
                moment = state.setdefault("moment", torch.zeros_like(weight))
                weight -= moment.mul_(group["momentum"]).add_(rate * update)


class SimCLR(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        # LABELLED: images a digit, for the evaluation.
        return CfgNode({"TEMPERATURE": 0.3, "WIDTH": 64, "LABELLED": 5})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["knn"]

    def build_model(self) -> nn.Module:
        width = self.cfg.TASK.WIDTH
        encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(4 * width, width)),
        )
        projector = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32)
        )
        return nn.Sequential(encoder, projector)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim = self.cfg.OPTIM
        return LARS(model.parameters(), optim.LR, optim.MOMENTUM, optim.WEIGHT_DECAY)

    def build_dataset(self, split: str) -> Dataset:
        """For "val" a few labelled images of the training come before those to be classified."""
        images, labels = load_digits().images[:, None].astype("float32") / 16, load_digits().target
        parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        images, others, labels, truth = map(torch.from_numpy, parts)
        if split == "train":
            return Views(images)
        bank = torch.cat([(labels == i).nonzero()[: self.cfg.TASK.LABELLED, 0] for i in range(10)])
        return TensorDataset(torch.cat([images[bank], others]), torch.cat([labels[bank], truth]))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """This rank's views against those of all ranks, among which they are found by number."""
        index, *views = batch
        ours = torch.stack([normalize(model(view), dim=1) for view in views], 1)
        everyone, numbers = self.gather(ours), self.gather(index)
        here = 2 * (index.unsqueeze(1) == numbers).int().argmax(1, keepdim=True)
        here = torch.cat([here, here + 1], 1).flatten()  # each view's own place; its pair is beside
        logits = ours.flatten(0, 1) @ everyone.flatten(0, 1).T / self.cfg.TASK.TEMPERATURE
        logits = logits.scatter(1, here.unsqueeze(1), -math.inf)
        pair = here ^ 1
        probabilities = logits.detach().softmax(1)
        return {
            "loss": cross_entropy(logits, pair),
            "contrast_accuracy": (logits.argmax(1) == pair).float().mean(),
            "contrast_entropy": torch.special.entr(probabilities).sum(1).mean(),
        }

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        return {"feature": normalize(model[0](images), dim=1), "label": labels}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """The nearest labelled images, which come first, vote, each by its likeness."""
        features, labels, bank = outputs["feature"], outputs["label"], 10 * self.cfg.TASK.LABELLED
        nearest = (features[bank:] @ features[:bank].T).div(0.07).exp().topk(5)
        votes = one_hot(labels[nearest.indices]) * nearest.values.unsqueeze(2)
        return {"knn": (votes.sum(1).argmax(1) == labels[bank:]).double().mean().item()}
