"""Gradients of every kind: dense or sparse, real or complex, of any type, or none at all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.edges.model import fitting, plain_name
from launcher.errors import UsageError


def sparse_weights(model: nn.Module) -> set[int]:
    """The ids of the weights whose gradients are sparse."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return {id(layer.weight) for layer in layers if layer.sparse}


def nothing_of(model: nn.Module, used: bool = False) -> torch.Tensor | float:
    """A sum over all weights that train (`used`: and have a gradient) whose gradient to each is of
    the kind that a batch's would be: of sparse rows for an embedding that says so."""
    sparse, sums = sparse_weights(model), []
    for p in model.parameters():
        if used and p.grad is None:
            continue
        if p.requires_grad and id(p) in sparse:
            row = torch.zeros(1, dtype=torch.int64, device=p.device)
            sums.append(nn.functional.embedding(row, p, sparse=True).sum().float())
        elif p.requires_grad:
            sums.append((torch.view_as_real(p) if p.is_complex() else p).sum().float())
    return torch.stack(sums).sum() if sums else 0.0


def numbers_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The numbers of those gradients that there are, each as a dense tensor of reals that shares
    its memory; a sparse one is coalesced for it."""
    found = []
    for p in parameters:
        if (grad := p.grad) is None:
            continue
        if grad.is_sparse:
            p.grad = grad = grad.coalesce()
            grad = grad.values()
        found.append(torch.view_as_real(grad) if grad.dtype.is_complex else grad)
    return found


def norm_of(numbers: list[torch.Tensor]) -> torch.Tensor:
    """The norm of them all, as torch.nn.utils.get_total_norm. That sorts them by device and type
    first, which takes longer than the norm of a small model, and is rarely needed."""
    if not numbers or len({(n.dtype, n.device) for n in numbers}) > 1:
        return torch.nn.utils.get_total_norm(numbers, foreach=True)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(numbers)))


class Clip:
    """TRAIN.GRAD_CLIP: bounds the gradients of weights in place, by TRAIN.GRAD_CLIP_BY."""

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        self.most, self.by = cfg.TRAIN.GRAD_CLIP, cfg.TRAIN.GRAD_CLIP_BY
        named = {plain_name(name): p for name, p in model.named_parameters()}
        skip = [fitting(named, at, "TRAIN.GRAD_CLIP_SKIP") for at in cfg.TRAIN.GRAD_CLIP_SKIP]
        self.skipped = {id(p) for found in skip for p in found}

    def __call__(
        self, parameters: Iterable[torch.Tensor], numbers: list[torch.Tensor], norm: torch.Tensor
    ) -> None:
        """`numbers` are all their gradients, and `norm` is the norm of those."""
        if not self.most:
            return
        if self.by == "norm":
            # As torch.nn.utils.clip_grads_with_norm_, which takes dense gradients alone.
            torch._foreach_mul_(numbers, torch.clamp(self.most / (norm + 1e-6), max=1.0))
            return
        clipped = [p for p in parameters if p.grad is not None and id(p) not in self.skipped]
        if self.by == "value":
            numbers = numbers_of(clipped)
            torch._foreach_clamp_min_(numbers, -self.most)
            torch._foreach_clamp_max_(numbers, self.most)
            return
        for p in clipped:
            _clip_adaptively(p, self.most)


def _clip_adaptively(p: torch.Tensor, most: float, least: float = 1e-3) -> None:
    """Scale a weight's gradient down where its norm exceeds a share of the weight's, each for
    itself for each output unit: row or filter; a vector is one unit, as is a number (Brock et al.
    2021, "High-performance large-scale image recognition without normalization", equation 3)."""
    grad = p.grad
    assert grad is not None
    if grad.is_sparse:
        raise UsageError("TRAIN.GRAD_CLIP_BY adaptive takes no sparse gradients: norm does.")

    def unit(tensor: torch.Tensor) -> torch.Tensor:
        dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
        return torch.linalg.vector_norm(tensor.detach(), dim=dims, keepdim=True)

    norm, bound = unit(grad), unit(p).clamp_min(least) * most
    grad.mul_(torch.where(norm > bound, bound / norm.clamp_min(1e-6), 1.0))
