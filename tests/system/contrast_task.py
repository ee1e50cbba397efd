"""A task whose loss compares the samples of all ranks, and with a queue of former ones."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from launcher import CfgNode
from tests.system.exact_task import SLEEP, Exact
from tests.system.leash import obey


class Contrast(Exact):
    """41 samples: with batches of eight, the last one leaves all ranks but the first idle."""

    shared_buffers = ("queue",)

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"SAMPLES": 41})

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        model.register_buffer("queue", torch.zeros(12, 8))
        return model

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        obey(self.recorder.step)
        time.sleep(SLEEP)
        x, _ = batch
        a, b = (nn.functional.normalize(model(view), dim=1) for view in (x, x.flip(1)))
        everyone, names = self.gather(b), self.gather(x[:, 0])
        likeness = torch.cat([a @ everyone.T, a @ model.queue.T], 1).div(0.2).log_softmax(1)
        with torch.no_grad():
            model.queue = torch.cat([self.gather(a), model.queue])[:12]
        return {"loss": -likeness[:, : len(names)][x[:, :1] == names].mean()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        a, b = (
            nn.functional.normalize(model(view), dim=1) for view in (batch[0], batch[0].flip(1))
        )
        return {"loss": 1 - (a * b).sum(1)}


class Late(Contrast):
    """Rank 1 never comes to its second gather of step 3."""

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        self.gather(batch[0])
        if self.recorder.step == 3 and os.environ.get("RANK") == "1":
            time.sleep(600)
        return super().train_step(model, batch)


class Gathering(Contrast):
    """Gathers in an evaluation."""

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        self.gather(batch[0])
        return super().eval_step(model, batch)
