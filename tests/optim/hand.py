"""Plain torch on the same batches, and a model with weights of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.engine.helpers import LENGTH, Plan, Regression, Weights, drawn


class Mixed(Regression):
    """Matrices, an embedding, norms, biases and a weight of no dimension."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8))
        parts = nn.ModuleDict({"table": nn.Embedding(3, 4), "body": body, "head": nn.Linear(8, 1)})
        parts.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
        return parts

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        x = x + model["table"]((x[:, 0] > 0).long())
        out = model["head"](model["body"](x)) * model.gain
        return {"loss": (out - y).square().mean()}


def by_hand(task: Any, make: Callable[[Any], list[Any]], steps: int, before: Any = None) -> Weights:
    """The weights after steps of the optimisers that `make` gives for the model; `before` is called
    with them before each step."""
    model, plan = task.build_model(), Plan(LENGTH, 8)
    optimizers = make(model)
    for step in range(steps):
        epoch, k = divmod(step, plan.steps_per_epoch)
        if before:
            before(optimizers, step)
        model.zero_grad()
        task.train_step(model, drawn(task, epoch, *plan.batch(k)))["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in model.parameters()]
