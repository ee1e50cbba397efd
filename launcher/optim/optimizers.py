"""Optimisers from OPTIM.*."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.edges.gradients import has_sparse_gradients
from launcher.edges.optimizer import by_phase, check_optimizers
from launcher.errors import UsageError


def build_optimizers(cfg: CfgNode, task: Any, model: nn.Module) -> dict[str, Any]:
    """The task's own optimisers by phase if it builds any, else "", the one that OPTIM.* names."""
    if not hasattr(task, "build_optimizer"):
        return {"": from_config(cfg, model)}
    who = f"{type(task).__name__}.build_optimizer"
    optimizers = by_phase(task.build_optimizer(model), who)
    check_optimizers(optimizers, model, who)
    if "" not in optimizers:
        try:
            inspect.signature(task.train_step).bind(model, None, "")
        except TypeError:
            raise UsageError(
                f"{who} gives the phases {', '.join(optimizers)}, so "
                f"{type(task).__name__}.train_step must take (model, batch, phase)"
            ) from None
    return optimizers


def from_config(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimiser that OPTIM.* names, for the weights of a module that train.

    Fused kernels update all parameters at once; torch 2.6 has them for both on CPU and CUDA.
    """
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
        # The fused kernel leaves momentum unset where the gradient scaler skips the first step, and
        # takes no weights that have none yet beside others that have.
        unset = cfg.TRAIN.PRECISION == "fp16" or cfg.MODEL.THAW
        fused = fused and (optim.MOMENTUM == 0 or not unset)
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
