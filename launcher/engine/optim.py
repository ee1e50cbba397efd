"""Optimisers from OPTIM.*."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.edges.gradients import has_sparse_gradients
from launcher.edges.optimizer import check_optimizer
from launcher.errors import UsageError


def build_optimizer(cfg: CfgNode, task: Any, model: nn.Module) -> Optimizer:
    """The task's own optimiser if it builds one, else the one that OPTIM.* names.

    Fused kernels update all parameters at once; torch 2.6 has them for both on CPU and CUDA.
    """
    if hasattr(task, "build_optimizer"):
        optimizer: Optimizer = task.build_optimizer(model)
        check_optimizer(optimizer, model, f"{type(task).__name__}.build_optimizer")
        return optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(
            "The model has no parameter to train: every one is frozen, or none exists."
        )
    optim = cfg.OPTIM
    sparse = has_sparse_gradients(model)
    if sparse and (optim.NAME != "sgd" or optim.WEIGHT_DECAY):
        raise UsageError(
            "The model has embeddings with sparse gradients, which OPTIM.NAME sgd without "
            "OPTIM.WEIGHT_DECAY takes, and torch.optim.SparseAdam (in build_optimizer)."
        )
    fused = not sparse and all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters
    )
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
