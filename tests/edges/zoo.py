"""Tasks of random parts: models, optimisers and batches as torch's protocols allow them.

TASK.PARTS names the parts. Each is something that other people's code holds, and that is either
taken or refused before the first step.
"""

from __future__ import annotations

import enum
import os
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task

LENGTH, WIDTH = 26, 6
FAIL_AT = "LAUNCHER_TEST_FAIL_AT"  # the step that fails, as a crash would


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Sampled:
    x: torch.Tensor
    y: torch.Tensor


def _rename(old: str, new: str) -> Any:
    def hook(module: Any, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + new] = state.pop(prefix + old)

    return hook


class Part(nn.Module):
    """One odd thing that a model may hold; it adds to the output, or keeps something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        draw = torch.Generator().manual_seed(len(kind))
        if kind == "sparse":
            self.rows = nn.Embedding(WIDTH, 1, sparse=True)
        elif kind == "complex":
            self.wave = nn.Parameter(torch.randn(WIDTH, 1, dtype=torch.complex64, generator=draw))
        elif kind == "double":
            self.fine = nn.Linear(WIDTH, 1).double()
        elif kind == "frozen":
            self.fixed = nn.Linear(WIDTH, 1).requires_grad_(False)
        elif kind == "tied":
            self.once, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.again.weight = self.once.weight
        elif kind == "norm":
            self.norm = nn.BatchNorm1d(WIDTH)
        elif kind == "resting norm":
            self.norm = nn.BatchNorm1d(WIDTH).eval()
        elif kind == "turned":
            self.register_buffer("grid", torch.randn(3, WIDTH, generator=draw).t())
        elif kind == "spread":
            self.register_buffer("grid", torch.zeros(1).expand(3))
        elif kind == "short":
            self.register_buffer("count", torch.zeros(3, dtype=torch.int16))
        elif kind == "sparse buffer":
            self.register_buffer("edges", torch.eye(3).to_sparse())
        elif kind == "quantised":
            whole = torch.arange(3.0)
            self.register_buffer("table", torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8))
        elif kind == "queue":
            self.register_buffer("queue", torch.zeros(4, WIDTH))
        elif kind == "unsaved":
            self.register_buffer("trace", torch.zeros(WIDTH), persistent=False)
        elif kind == "renamed":
            self.register_buffer("queue", torch.zeros(WIDTH))
            self._register_state_dict_hook(_rename("queue", "line"))
            self.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *_: _rename("line", "queue")(module, state, prefix)
            )
        elif kind == "rests later":
            self.norm = nn.BatchNorm1d(WIDTH)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        elif kind == "moved":
            self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        elif kind == "lazy":
            self.later = nn.LazyLinear(1)
        elif kind == "weights of their own layout":
            self.conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)
        self.seen: Any = 0

    def get_extra_state(self) -> Any:
        made: dict[str, Any] = {
            "extra": lambda: {"seen": self.seen, "of": [torch.tensor([1.5]), (2, "m", None, True)]},
            "numpy": lambda: {"seen": np.int64(self.seen), "table": np.arange(3.0)},
            "enum": lambda: {"seen": self.seen, "colour": Colour.RED},
            "named": lambda: Pair(torch.ones(1), torch.ones(1)),
            "object": lambda: UserDict(seen=self.seen),
            "function": lambda: {"seen": self.seen, "of": len},
        }
        return made.get(self.kind, lambda: None)()

    def set_extra_state(self, state: Any) -> None:
        if isinstance(state, dict):
            self.seen = int(state["seen"])

    def forward(self, x: torch.Tensor) -> torch.Tensor | float:
        if self.training:
            self.seen += 1
        if self.kind == "sparse":
            return self.rows(x.abs().long() % WIDTH).mean(1)
        if self.kind == "complex":
            return (x.to(torch.complex64) @ self.wave).abs()
        if self.kind == "double":
            return self.fine(x.double()).float()
        if self.kind == "frozen":
            return self.fixed(x)
        if self.kind == "tied":
            return self.again(self.once(x).tanh()).mean(1, keepdim=True)
        if self.kind in ("norm", "resting norm"):
            return self.norm(x).mean(1, keepdim=True)
        if self.kind == "turned":
            return (x @ self.grid).mean(1, keepdim=True)
        if self.kind == "short" and self.training:
            self.count += 1
        if self.kind in ("unsaved", "renamed"):
            kept = self.trace if self.kind == "unsaved" else self.queue
            if self.training:
                kept.lerp_(x.detach().mean(0), 0.5)
            return x @ kept[:, None].clone()
        if self.kind == "rests later":
            if self.training and int(self.count.add_(1)) == 3:
                self.norm.eval()  # once: a resumed model must still be
            return self.norm(x).mean(1, keepdim=True)
        if self.kind == "queue" and self.training:
            self.queue.copy_(torch.cat([self.queue[1:], x.detach()[:1]]))
        if self.kind == "queue":
            return self.queue.mean() * x.mean(1, keepdim=True)
        if self.kind == "moved":
            return self.teacher(x).mean(1, keepdim=True)
        if self.kind == "weights of their own layout":
            return self.conv(x[:, :4].repeat(1, 2).view(-1, 2, 2, 2)).mean((1, 2, 3))[:, None]
        return 0.0


class Net(nn.Module):
    def __init__(self, parts: list[str]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(WIDTH, 1)
        self.parts = nn.ModuleList(map(Part, parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.drop(self.first(x).tanh()))
        for part in self.parts:
            y = y + part(x)
        return y


class NoRate:
    """An optimiser that is no torch.optim.Optimizer, and has no learning rate."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= 0.01 / self.steps * (p.grad.to_dense() if p.grad.is_sparse else p.grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Modes(torch.optim.SGD):
    """One with modes: evaluated are weights that lie elsewhere (as those of schedule-free)."""

    def eval(self) -> None:
        self._shift(0.5)

    def train(self) -> None:
        self._shift(-0.5)

    def _shift(self, by: float) -> None:
        if self.param_groups[0].get("shifted", -0.5) == by:
            return
        self.param_groups[0]["shifted"] = by
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(by)


class Counts(torch.optim.SGD):
    """Counts its steps in its groups, and goes by that."""

    def __init__(self, p: Any) -> None:
        super().__init__(p, 0.02)
        self.param_groups[0]["t"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["t"] += 1
        self.param_groups[0]["weight_decay"] = 0.01 * self.param_groups[0]["t"]
        return super().step(closure)


def held(p: Any) -> Any:
    optimizer = torch.optim.SGD(p, 0.02)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return optimizer


OPTIMISERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.02),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "numpy rate": lambda p: torch.optim.SGD(p, np.sqrt(4e-4)),
    "rate of a tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01), capturable=False),
    "held by a scheduler": held,
    "counts": Counts,
    "no rate": NoRate,
    "modes": lambda p: Modes(p, 0.02),
    "scaled": lambda p: torch.optim.SGD([{"params": list(p), "lr_scale": 0.5}], 0.02),
    "enum in a group": lambda p: torch.optim.SGD([{"params": list(p), "colour": Colour.RED}], 0.02),
    "closure": lambda p: torch.optim.LBFGS(p),
    "weights of nobody": lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(1))], 0.02),
}
MODELS = (
    *("sparse", "complex", "double", "frozen", "tied", "norm", "resting norm", "turned", "spread"),
    *("unsaved", "renamed", "rests later"),
    *("short", "sparse buffer", "quantised", "queue", "moved", "lazy", "extra", "numpy", "enum"),
    *("named", "object", "function", "weights of their own layout"),
)
BATCHES = ("list", "tuple", "dict", "ordered", "user dict", "named tuple", "data class")
# What cannot be taken, and a word of the reason.
REFUSED = {
    "lazy": "lazy weights",
    "enum": "zoo.Colour",
    "named": "Pair",
    "object": "UserDict",
    "function": "builtin_function_or_method",
    "enum in a group": "optimizer/param_groups/0/colour",
    "closure": "several times a step",
    "weights of nobody": "not the model's",
}


class Rows(Dataset):
    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(LENGTH, WIDTH, generator=draw)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.x[index].sin().sum()[None]


class Zoo(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"PARTS": ["extra"], "OPTIMISER": "sgd", "BATCH": "tuple"})

    def build_model(self) -> nn.Module:
        return Net(list(self.cfg.TASK.PARTS))

    def build_optimizer(self, model: nn.Module) -> Any:
        return OPTIMISERS[self.cfg.TASK.OPTIMISER](p for p in model.parameters() if p.requires_grad)

    def build_dataset(self, split: str) -> Dataset:
        return Rows(len(split))

    def collate(self, samples: list[Any]) -> Any:
        x, y = (torch.stack(column) for column in zip(*samples, strict=True))
        made: dict[str, Any] = {
            "list": lambda: [x, y],
            "tuple": lambda: (x, y),
            "dict": lambda: {"x": x, "y": y},
            "ordered": lambda: OrderedDict(x=x, y=y),
            "user dict": lambda: UserDict(x=x, y=y),
            "named tuple": lambda: Pair(x, y),
            "data class": lambda: Sampled(x, y),
        }
        return made[self.cfg.TASK.BATCH]()

    def taken(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(batch, (dict, UserDict)):
            return batch["x"], batch["y"]
        return (batch.x, batch.y) if isinstance(batch, Sampled) else (batch[0], batch[1])

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        if str(self.recorder.step) == os.environ.get(FAIL_AT):
            raise ValueError("a planned failure")
        x, y = self.taken(batch)
        with torch.no_grad():
            for part in model.parts:
                if part.kind == "moved":
                    part.teacher.weight.data.lerp_(model.first.weight, 0.1)
        return {"loss": nn.functional.mse_loss(model(x), y), "whole": np.int64(2**53 - 1)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = self.taken(batch)
        x = x + 0.1 * torch.randn_like(x)
        return {"loss": (model(x) - y).square().mean(1), "numpy": np.ones(len(x))}
