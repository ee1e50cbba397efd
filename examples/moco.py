"""Momentum contrast, after main_moco.py and moco/builder.py of github.com/facebookresearch/moco.

Kept (version 2): a key encoder that follows the other, a queue of keys, one positive a query, the
projection head, SGD with cosine, top-1 and top-5 of telling the key of a query from the queue's.
Smaller: scikit-learn's 8x8 digits, a small net. Its group norm has no statistics over a batch that
could give the positive away, so nothing is shuffled between ranks.
Labels are for the evaluation alone: the nearest of a few labelled images, by the encoder's output.
"""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize, one_hot
from torch.utils.data import Dataset, TensorDataset

from launcher import CfgNode, Task


class Views(Dataset):
    """Two views of an image, each cropped, turned and of another contrast."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.view(index), self.view(index)

    def view(self, index: int) -> torch.Tensor:
        turn, scale = random.uniform(-0.25, 0.25), random.uniform(0.8, 1.1)
        x, y = random.uniform(-0.15, 0.15), random.uniform(-0.15, 0.15)
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        places = affine_grid(
            torch.tensor([[[cos, -sin, x], [sin, cos, y]]]), [1, 1, 8, 8], align_corners=False
        )
        image = grid_sample(self.images[index, None], places, align_corners=False)[0]
        return image * random.uniform(0.7, 1.3)


def build_encoder(width: int) -> nn.Sequential:
    """Features, and the projection that is trained on them."""
    features = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 1, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv2d(32, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * width, width)),
    )
    head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32))
    return nn.Sequential(features, head)


class Pair(nn.Module):
    """The encoder that is trained, the one that follows it, and the newest keys of that one."""

    def __init__(self, width: int, keys: int) -> None:
        super().__init__()
        self.query = build_encoder(width)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(keys, 32), dim=1))


class MoCo(Task):
    shared_buffers = ("queue",)

    @classmethod
    def defaults(cls) -> CfgNode:
        # LABELLED: images a digit, for the evaluation.
        sizes = {"WIDTH": 64, "QUEUE": 512, "LABELLED": 5}
        return CfgNode({"TEMPERATURE": 0.2, "MOMENTUM": 0.98, **sizes})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["knn"]

    def build_model(self) -> nn.Module:
        self.model = Pair(self.cfg.TASK.WIDTH, self.cfg.TASK.QUEUE)
        return self.model

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
        queries = normalize(model.query(batch[0]), dim=1)
        with torch.no_grad():
            keys = normalize(model.key(batch[1]), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ model.queue.T], 1) / self.cfg.TASK.TEMPERATURE
        # The keys of all ranks; a new tensor, for the backward pass needs the old one.
        model.queue = torch.cat([self.gather(keys), model.queue])[: len(model.queue)]
        better = (logits[:, 1:] >= logits[:, :1]).sum(1)
        return {
            "loss": cross_entropy(logits, torch.zeros_like(better)),
            "top1": (better < 1).float().mean(),
            "top5": (better < 5).float().mean(),
        }

    def on_step(self) -> None:
        """Once an update, on all ranks alike: train_step comes once a micro-batch, and not at all
        on a rank without samples. Before the next forward pass, as in the original."""
        share = 1 - self.cfg.TASK.MOMENTUM
        with torch.no_grad():
            for key, query in zip(
                self.model.key.parameters(), self.model.query.parameters(), strict=True
            ):
                key.lerp_(query, share)

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        return {"feature": normalize(model.query[0](images), dim=1), "label": labels}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """The nearest labelled images, which come first, vote, each by its likeness."""
        features, labels, bank = outputs["feature"], outputs["label"], 10 * self.cfg.TASK.LABELLED
        nearest = (features[bank:] @ features[:bank].T).div(0.07).exp().topk(5)
        votes = one_hot(labels[nearest.indices]) * nearest.values.unsqueeze(2)
        return {"knn": (votes.sum(1).argmax(1) == labels[bank:]).double().mean().item()}
