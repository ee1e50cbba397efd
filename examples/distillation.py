"""Knowledge distillation, after beginner_source/knowledge_distillation_tutorial.py of
pytorch/tutorials.

Kept: a deep teacher is trained on the labels; then a light student on the labels and on the
teacher's softened outputs, weighed 0.75 to 0.25 at temperature 2, while the teacher rests in eval
mode; Adam at 1e-3 for both, dropout. Smaller: scikit-learn's 8x8 digits for CIFAR-10, narrower
nets. New: the student begins with the teacher's first layers, as DistilBERT does. They are frozen
(MODEL.FREEZE) until its classifier knows what to do with them (MODEL.THAW).

Teacher and student are one model and the phases of one run, one after the other, so that the run is
complete in itself and a resume goes on in either. With a teacher out of a file: MODEL.WEIGHTS with
names such as teacher.features.0.weight, MODEL.WEIGHTS_STRICT False and TASK.TEACHER_EPOCHS 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task


class Network(nn.Module):
    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def convolutions(*widths: int) -> nn.Sequential:
    """One for each two neighbouring widths; each halves the image."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers)


def classifier(features: int, hidden: int) -> nn.Sequential:
    layers = nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 10)
    return nn.Sequential(nn.Flatten(), *layers)


class Distillation(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"TEACHER_EPOCHS": 10, "TEMPERATURE": 2.0, "SOFT_WEIGHT": 0.25})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "label_loss", "soft_loss", "accuracy", "teacher_accuracy", "agreement"]

    def build_model(self) -> nn.Module:
        teacher = Network(convolutions(1, 16, 64), classifier(64 * 4, 128))
        student = Network(convolutions(1, 16), classifier(16 * 16, 16))
        self.model = nn.ModuleDict({"teacher": teacher, "student": student})
        return self.model

    def build_optimizer(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        rate = self.cfg.OPTIM.LR
        return {phase: torch.optim.Adam(model[phase].parameters(), rate) for phase in model}

    def build_dataset(self, split: str) -> TensorDataset:
        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0)
        images, labels = parts[split == "val" :: 2]
        pixels = torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 16
        return TensorDataset((pixels - 0.305) / 0.376, torch.tensor(labels))

    @property
    def teaching(self) -> int:
        """The step at which the teacher is trained, and begins to teach."""
        return self.cfg.TASK.TEACHER_EPOCHS * self.run.steps_per_epoch

    def phases(self, step: int) -> str:
        return "teacher" if step < self.teaching else "student"

    def on_step(self) -> None:
        """Hand over. What is put into eval mode here stays there, over a resume too."""
        if self.run.progress.step == self.teaching:
            teacher, student = self.model["teacher"].eval(), self.model["student"]
            first = teacher.features[: len(student.features)]
            student.features.load_state_dict(first.state_dict())

    on_start = on_step  # for a teacher that is trained already

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, torch.Tensor]:
        images, labels = batch
        if phase == "teacher":
            logits = model["teacher"](images)
            return {
                "loss": F.cross_entropy(logits, labels),
                "accuracy": correct(logits, labels).float().mean(),
            }
        # The launcher has switched the teacher's gradients off.
        found = self.losses(model, images, labels)
        return {name: values.float().mean() for name, values in found.items()}

    def eval_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return self.losses(model, *batch)

    def losses(
        self, model: Any, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Of each image, the student's losses and whose guess is right."""
        temperature, share = self.cfg.TASK.TEMPERATURE, self.cfg.TASK.SOFT_WEIGHT
        logits, told = model["student"](images), model["teacher"](images)
        student, teacher = ((x / temperature).log_softmax(1) for x in (logits, told))
        soft_loss = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        soft_loss = soft_loss * temperature**2  # by as much its gradients are smaller
        label_loss = F.cross_entropy(logits, labels, reduction="none")
        return {
            "loss": share * soft_loss + (1 - share) * label_loss,
            "label_loss": label_loss,
            "soft_loss": soft_loss,
            "accuracy": correct(logits, labels),
            "teacher_accuracy": correct(told, labels),
            "agreement": correct(logits, told.argmax(1)),
        }


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(1) == labels
