"""Optimisers from OPTIM.*."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.errors import UsageError


def build_optimizer(cfg: CfgNode, task: Any, model: nn.Module) -> Optimizer:
    """The task's own optimiser if it builds one, else the one that OPTIM.* names.

    Fused kernels update all parameters at once; torch 2.6 has them for both on CPU and CUDA.
    """
    if hasattr(task, "build_optimizer"):
        optimizer = task.build_optimizer(model)
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"{type(task).__name__}.build_optimizer must return a torch.optim.Optimizer, "
                f"not {type(optimizer).__name__}"
            )
        return optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(
            "The model has no parameter to train: every one is frozen, or none exists."
        )
    optim = cfg.OPTIM
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if optim.NAME == "sgd":
        # The fused kernel leaves momentum unset where the gradient scaler skips the first step.
        fused = fused and (optim.MOMENTUM == 0 or cfg.TRAIN.PRECISION != "fp16")
        return torch.optim.SGD(
            parameters,
            lr=optim.LR,
            momentum=optim.MOMENTUM,
            weight_decay=optim.WEIGHT_DECAY,
            nesterov=optim.NESTEROV,
            fused=fused,
        )
    return torch.optim.AdamW(
        parameters,
        lr=optim.LR,
        betas=tuple(optim.BETAS),
        eps=optim.EPS,
        weight_decay=optim.WEIGHT_DECAY,
        fused=fused,
    )


def rates(optimizer: Optimizer) -> dict[str, float]:
    """`train/lr`, that of the first parameter group, and where the groups were made with different
    rates `train/lr/<name>` for each: its "name", or its number."""
    groups = optimizer.param_groups
    found = {"train/lr": float(groups[0]["lr"])}
    if len({group.get("initial_lr", group["lr"]) for group in groups}) > 1:
        for number, group in enumerate(groups):
            found[f"train/lr/{group.get('name', number)}"] = float(group["lr"])
    return found
