"""Gradients of every kind are bounded as torch does it, or as the paper says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from launcher.edges.gradients import Clip, norm_of, numbers_of
from launcher.errors import UsageError
from tests.engine.helpers import Regression, Trainer, assert_close, config, drawn


def net() -> nn.Module:
    """Weights of every kind, each with a gradient."""
    torch.manual_seed(4)
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 3, 3), "line": nn.Linear(4, 5), "one": nn.Linear(1, 1, bias=False)}
    )
    model.register_parameter("number", nn.Parameter(torch.tensor(0.0)))
    model.register_parameter("wave", nn.Parameter(torch.randn(3, 2, dtype=torch.complex64)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def clipped(model: nn.Module, *words: object) -> dict[str, torch.Tensor]:
    clip, weights = Clip(config(*words), model), list(model.parameters())
    numbers = numbers_of(weights)
    clip(weights, numbers, norm_of(numbers))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_by_value() -> None:
    model, plain = net(), net()
    found = clipped(model, "TRAIN.GRAD_CLIP", 0.3, "TRAIN.GRAD_CLIP_BY", "value")
    wave: Any = plain.get_parameter("wave").grad  # of a complex number both parts
    torch.view_as_real(wave).clamp_(-0.3, 0.3)
    real = [p for p in plain.parameters() if not p.is_complex()]
    nn.utils.clip_grad_value_(real, 0.3)
    assert_close(list(found.values()), [p.grad for p in plain.parameters()])


def test_adaptively() -> None:
    """Unit by unit, written down by hand: a row, a filter, a vector, a number."""
    plain = net()
    found = clipped(net(), "TRAIN.GRAD_CLIP", 0.5, "TRAIN.GRAD_CLIP_BY", "adaptive")
    for name, p in plain.named_parameters():
        grad: Any = p.grad
        units = [...] if p.dim() < 2 else range(len(p))
        expected = grad.clone()
        for unit in units:
            bound = 0.5 * max(p[unit].detach().abs().square().sum().sqrt().item(), 1e-3)
            norm = grad[unit].abs().square().sum().sqrt().item()
            if norm > bound:
                expected[unit] = grad[unit] * (bound / norm)
        torch.testing.assert_close(found[name], expected)
        assert not torch.equal(found[name], grad)


@pytest.mark.parametrize("by", ["value", "adaptive"])
def test_what_is_left_alone(by: str) -> None:
    model, plain = net(), net()
    words = ("TRAIN.GRAD_CLIP", 0.01, "TRAIN.GRAD_CLIP_BY", by)
    found = clipped(model, *words, "TRAIN.GRAD_CLIP_SKIP", ["line", "conv.b*"])
    for name, p in plain.named_parameters():
        alone = name.startswith("line.") or name == "conv.bias"
        assert torch.equal(found[name], p.grad) == alone, name  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"TRAIN\.GRAD_CLIP_SKIP: 'lines' fits no weight"):
        clipped(model, *words, "TRAIN.GRAD_CLIP_SKIP", ["lines"])


def test_sparse_gradients() -> None:
    def embedding() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Embedding(9, 4, sparse=True)
        (model(torch.tensor([1, 1, 5])) * 3).sum().backward()
        return model

    found = clipped(embedding(), "TRAIN.GRAD_CLIP", 2.0, "TRAIN.GRAD_CLIP_BY", "value")["weight"]
    dense = embedding().get_parameter("weight").grad
    assert dense is not None and torch.equal(found.to_dense(), dense.to_dense().clamp(-2, 2))
    with pytest.raises(UsageError, match="adaptive takes no sparse gradients"):
        clipped(embedding(), "TRAIN.GRAD_CLIP", 2.0, "TRAIN.GRAD_CLIP_BY", "adaptive")


@pytest.mark.parametrize("by", ["value", "adaptive"])
def test_a_step_clips_the_whole_batch(by: str) -> None:
    """Not its micro-batches; and records the norm before."""
    task = Regression()
    words = ("TRAIN.GRAD_CLIP", 0.02, "TRAIN.GRAD_CLIP_BY", by, "OPTIM.MOMENTUM", 0, "OPTIM.LR", 1)
    trainer = Trainer(task, *words, micro=3)
    model = copy.deepcopy(trainer.state.model)
    task.train_step(model, drawn(task, 0, 0, 8))["loss"].backward()
    norm = norm_of(numbers_of(model.parameters()))
    clipped(model, *words[:4])
    torch.optim.SGD(model.parameters(), 1.0).step()
    trainer.run(1)
    assert_close(trainer.weights, [*model.parameters()])
    assert trainer.recorded()["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
