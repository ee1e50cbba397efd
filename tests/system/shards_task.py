"""Tasks for tests/system/test_shards.py: all that may differ between numbers of ranks, but what
TRAIN.SHARDS refuses."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from launcher import CfgNode, Task
from tests.system.exact_task import Noisy

SLEEP = float(os.environ.get("LAUNCHER_TEST_SLEEP", "0"))


class Drawing(torch.optim.SGD):
    """Adds noise to the weights, as stochastic gradient Langevin dynamics do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-4)


class Mixed(Task):
    """A weighted classifier that draws from all generators, of one bucket or, with WIDTH 2000, of
    several; a weight that some shards use and others do not, and one in double precision."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"SAMPLES": 53, "WIDTH": 24, "WEIGHS": True, "DRAWS": False})

    def build_model(self) -> nn.Module:
        width = self.cfg.TASK.WIDTH
        return nn.ModuleDict(
            {
                "body": nn.Sequential(
                    nn.Linear(32, width),
                    nn.GroupNorm(4, width),
                    nn.GELU(),
                    nn.Dropout(0.3),
                    nn.Linear(width, width),
                    nn.Dropout(0.3),
                ),
                "head": nn.Linear(width, 2),
                "rare": nn.Linear(width, 2, bias=False),
                "scale": nn.ParameterDict({"wide": torch.ones(2, dtype=torch.float64)}),
            }
        )

    def build_optimizer(self, model: nn.Module) -> Any:
        kind = Drawing if self.cfg.TASK.DRAWS else torch.optim.AdamW
        return kind(model.parameters(), lr=self.cfg.OPTIM.LR, weight_decay=0.1)

    def build_dataset(self, split: str) -> Noisy:
        return Noisy(self.cfg.TASK.SAMPLES if split == "train" else 17, 1 + (split == "val"))

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        time.sleep(SLEEP)
        x, y = batch
        hidden = model["body"](x + 0.01 * torch.randn_like(x))
        logits = model["head"](hidden) * model["scale"]["wide"].to(hidden.dtype)
        if y[0] == 1:
            logits = logits + model["rare"](hidden)
        losses = nn.functional.cross_entropy(logits.float(), y, reduction="none")
        weights = 0.5 + y.float() + float(np.random.rand())
        self.recorder.scalar("coin", random.random())
        loss = (losses * weights).sum() / weights.sum()
        more = {"weight": weights.sum()} if self.cfg.TASK.WEIGHS else {}
        return {"loss": loss, "sharp": logits.detach().abs().max(), **more}

    def on_step(self) -> None:
        self.recorder.scalar("drawn", torch.rand(()).item())

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        x, y = batch
        logits = model["head"](model["body"](x))
        loss = nn.functional.cross_entropy(logits.float(), y, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(1) == y}


class Game(Task):
    """Two phases that draw; the critic takes more steps than the generator."""

    def build_model(self) -> nn.Module:
        generator = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 32))
        critic = nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
        return nn.ModuleDict({"generator": generator, "critic": critic})

    def build_optimizer(self, model: Any) -> Any:
        return {
            phase: torch.optim.Adam(model[phase].parameters(), self.cfg.OPTIM.LR)
            for phase in ("critic", "generator")
        }

    def phases(self, step: int) -> Any:
        return ["critic", "generator"] if step % 3 == 2 else "critic"

    def build_dataset(self, split: str) -> Noisy:
        return Noisy(53 if split == "train" else 17, 1 + (split == "val"))

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, Any]:
        time.sleep(SLEEP)
        x, _ = batch
        guess = model["generator"](torch.randn(len(x), 8))
        log = nn.functional.logsigmoid
        false, true = model["critic"](guess), model["critic"](x)
        return {"loss": (-(log(true) + log(-false)) if phase == "critic" else -log(false)).mean()}

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        x, _ = batch
        false = model["critic"](model["generator"](torch.randn(len(x), 8))).squeeze(1)
        return {"loss": false - model["critic"](x).squeeze(1)}


class Counting(Mixed):
    """Keeps a state that each batch changes."""

    seen = 0

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        self.seen += 1
        return super().train_step(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Steps(Counting):
    """One that each step changes, alike on all ranks."""

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return Mixed.train_step(self, model, batch)

    def on_step(self) -> None:
        self.seen += 1
        self.recorder.scalar("seen", self.seen)


class Normed(Mixed):
    """Batch-norm in the middle."""

    frozen = False

    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model["body"][1] = nn.BatchNorm1d(self.cfg.TASK.WIDTH)
        if self.frozen:
            model["body"][1].eval()
        return model


class Frozen(Normed):
    frozen = True


class Spectral(Mixed):
    """A module of torch's that keeps something of each pass in a buffer."""

    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model["head"] = nn.utils.parametrizations.spectral_norm(model["head"])
        return model


class Gathering(Mixed):
    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        self.gather(batch[0])
        return super().train_step(model, batch)


class Reducing(Mixed):
    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        torch.distributed.all_reduce(batch[0])
        return super().train_step(model, batch)


class Sparse(Mixed):
    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model["table"] = nn.Embedding(4, 4, sparse=True)
        return model


class Teacher(Mixed):
    """Moves weights in its forward pass, past autograd's own count of changes."""

    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model["teacher"] = nn.Linear(2, 2).requires_grad_(False)
        return model

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        for p in model["teacher"].parameters():
            p.data.mul_(0.9)
        return super().train_step(model, batch)


class Late(Game):
    """The second phase alone changes a state, and not in the first steps."""

    seen = 0

    def train_step(self, model: Any, batch: Any, phase: str) -> dict[str, Any]:
        self.seen += phase == "generator" and self.run.progress.step > 3
        return super().train_step(model, batch, phase)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen * (1 + self.run.rank), "none": np.array([1.0, np.nan])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


Thawing = Normed


class Remembering(Mixed):
    """Its evaluation changes a buffer that training goes by."""

    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model["body"].register_buffer("seen", torch.zeros(()))
        return model

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        out = super().train_step(model, batch)
        return {**out, "loss": out["loss"] * (1 + model["body"].seen)}

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        model["body"].seen += 1
        return super().eval_step(model, batch)


class Begun(Mixed):
    def build_model(self) -> nn.Module:
        self.model: Any = super().build_model()
        self.projection = torch.randn(32, 32) / 6
        return self.model

    def build_dataset(self, split: str) -> Any:
        data = super().build_dataset(split)
        if split != "train":
            return data
        return torch.utils.data.random_split(data, [40, 13])[0]

    def on_start(self) -> None:
        with torch.no_grad():
            self.model["head"].weight.add_(torch.randn(()), alpha=0.1)

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return super().train_step(model, (batch[0] @ self.projection, batch[1]))
