"""Scikit-learn's bundled 8x8 handwritten digits: real data that needs no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.errors import UsageError
from launcher.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn


class Digits(Task):
    """1,797 grey images of 8x8 in 10 classes, in a fixed stratified 80/20 split."""

    @classmethod
    def defaults(cls) -> CfgNode:
        # MODEL: "convnet" on the 8x8 images, or "lenet" (LeNet-5) on images scaled up to 32x32.
        return CfgNode({"MODEL": "convnet", "DROPOUT": 0.5})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "accuracy"]

    def build_model(self) -> nn.Module:
        from launcher.tasks.convnets import MODELS

        name = self.cfg.TASK.MODEL
        if name not in MODELS:
            raise UsageError(f"TASK.MODEL: {name!r} is none of {', '.join(MODELS)}")
        return MODELS[name](self.cfg.TASK.DROPOUT)

    def build_dataset(self, split: str) -> Any:
        from torch.utils.data import TensorDataset

        images, labels = read(split)
        if split == "val":
            self.images = images  # to show those that are misread
        return TensorDataset(normalised(images), labels)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        guesses = logits.argmax(1)
        return {
            "loss": cross_entropy(logits, labels, reduction="none"),
            "accuracy": guesses == labels,
            # Whole numbers are no metrics; they only go to `summarize`.
            "guess": guesses,
            "label": labels,
        }

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Show which digits are taken for which, and the images that are misread."""
        import torch

        from launcher.tasks.pictures import grid, heat

        guesses, labels = outputs["guess"], outputs["label"]
        counts = torch.bincount(labels * 10 + guesses, minlength=100).view(10, 10)
        table = [["digit \\ read as", *range(10)], ["---"] * 11]
        table += [[f"**{i}**", *row] for i, row in enumerate(counts.tolist())]
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in table]
        self.recorder.text("confusion", "\n".join(lines))
        # Rows are digits, columns what they were read as.
        self.recorder.image("confusion_matrix", heat(counts))
        wrong = (guesses != labels).nonzero().flatten()[:40]
        if len(wrong):
            self.recorder.image("misread", grid(self.images[wrong]))
            told = [f"{labels[i]} read as {guesses[i]}" for i in wrong.tolist()]
            self.recorder.text("misread_as", "In the image's order: " + ", ".join(told))
        return {}


def read(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a split, (N, 1, 8, 8) from 0 to 1, and their labels, int64."""
    import numpy as np
    import torch

    # Found, not imported: scikit-learn takes longer to import than torch.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UsageError("the digits need scikit-learn: pip install 'launcher[examples]'")
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(file, np.float32, delimiter=","))  # pixels and a label
    labels = rows[:, 64].long()
    in_val = torch.zeros(len(rows), dtype=torch.bool)
    in_val[labels.argsort(stable=True)[::5]] = True  # a fifth of each class
    chosen = in_val if split == "val" else ~in_val
    return rows[chosen, :64].view(-1, 1, 8, 8) / 16, labels[chosen]  # pixels are 0 to 16


def normalised(images: torch.Tensor) -> torch.Tensor:
    """To about zero mean and unit variance."""
    return (images - 0.3) / 0.38
