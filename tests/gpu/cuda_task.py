"""Tasks for a GPU: one in which waiting for it is an error, one that needs too much of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher import Task


class Numbered(torch.utils.data.Dataset):
    """Samples that tell what they should be, in ordinary memory."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1024,), float(index)), index


class Strict(Task):
    def build_model(self) -> nn.Module:
        return nn.Linear(1024, 1)

    def build_dataset(self, split: str) -> Numbered:
        return Numbered()

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, number = batch
        wrong = (x != number[:, None]).sum()
        return {"loss": model(x / 4096).square().mean(), "wrong": wrong}

    def on_step(self) -> None:
        if self.run.progress.step == 20:
            torch.cuda.set_sync_debug_mode("error")
        if self.run.progress.step == 39:
            torch.cuda.set_sync_debug_mode("default")


class Huge(Strict):
    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        torch.empty(1 << 50, device=batch[0].device)
        raise AssertionError("so much memory is in no GPU")
