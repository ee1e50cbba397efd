"""A small task that goes wrong where LAUNCHER_TEST_WRONG says."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task
from launcher.telemetry.sinks import Sink

WRONG = os.environ.get("LAUNCHER_TEST_WRONG", "")


class Points(Dataset):
    def __init__(self, length: int) -> None:
        draw = torch.Generator().manual_seed(length)
        self.x, self.y = torch.randn(length, 5, generator=draw), torch.arange(length) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index]}


class Small(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"LABELS": True})

    def build_model(self) -> nn.Module:
        width = 9 if WRONG == "shape" else 8
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(width, 3))

    def build_dataset(self, split: str) -> Points:
        return Points(48 if split == "train" else 20)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if WRONG == "raise" and self.recorder.step == 5:
            raise ValueError("as planted")
        if WRONG == "breakpoint" and self.recorder.step == 3:
            breakpoint()
        doubled = batch["x"] * 2
        logits = model(doubled)
        if WRONG == "nan" and self.recorder.step == 4:
            logits = logits * torch.zeros(()).log() * 0
        if not self.cfg.TASK.LABELS:  # which the loss then cannot follow
            logits = logits.detach() + model[0].bias.sum() * 0
        return {"loss": nn.functional.cross_entropy(logits, batch["y"])}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if WRONG == "eval_step":
            raise ValueError("as planted")
        logits = model(batch["x"] * 2)
        return {"loss": nn.functional.cross_entropy(logits, batch["y"], reduction="none")}

    def summarize(self, outputs: dict[str, Any]) -> dict[str, float]:
        if WRONG == "summarize":
            raise ValueError("as planted")
        return {"spread": float(outputs["loss"].std())}


class FullDisk:
    """A callback with a sink that cannot be written."""

    def __init__(self, run: Any) -> None:
        pass

    def sink(self) -> Sink:
        class Full(Sink):
            name = "a full disk"

            def write(self, items: Any) -> None:
                raise OSError("as planted")

        return Full()
