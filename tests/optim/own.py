"""Optimisers of somebody's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Signs(Optimizer):
    """Goes by the signs of a mean of gradients."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.1, beta: float = 0.9
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(mean.sign(), alpha=-group["lr"])


class Plain(Optimizer):
    """Has a rate alone."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


class Fails(Plain):
    def __init__(self, params: Any, lr: float) -> None:
        raise ValueError("no rate is good enough")
