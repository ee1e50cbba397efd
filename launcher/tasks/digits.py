"""Scikit-learn's bundled 8x8 handwritten digits: real data that needs no download."""

from __future__ import annotations

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
        import torch
        from torch.utils.data import TensorDataset

        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise UsageError(
                "the digits task needs scikit-learn: pip install 'launcher[examples]'"
            ) from error
        digits = load_digits()
        parts = train_test_split(
            digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
        )
        images, labels = parts[split == "val" :: 2]
        pixels = torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 16  # they are 0 to 16
        if split == "val":
            self.images = pixels  # to show those that are misread
        # To about zero mean and unit variance.
        return TensorDataset((pixels - 0.3) / 0.38, torch.tensor(labels, dtype=torch.int64))

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
