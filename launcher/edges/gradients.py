"""Gradients of every kind: dense or sparse, real or complex, of any type, or none at all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


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
        found.append(torch.view_as_real(grad) if grad.is_complex() else grad)
    return found


def norm_of(numbers: list[torch.Tensor]) -> torch.Tensor:
    """The norm of them all, as torch.nn.utils.get_total_norm. That sorts them by device and type
    first, which takes longer than the norm of a small model, and is rarely needed."""
    if not numbers or len({(n.dtype, n.device) for n in numbers}) > 1:
        return torch.nn.utils.get_total_norm(numbers, foreach=True)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(numbers)))


def clip(numbers: list[torch.Tensor], norm: torch.Tensor, most: float) -> None:
    """Scale gradients down to a norm of `most`, as torch.nn.utils.clip_grads_with_norm_, which
    takes dense gradients alone."""
    torch._foreach_mul_(numbers, torch.clamp(most / (norm + 1e-6), max=1.0))
