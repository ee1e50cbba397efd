"""Optimisers from OPTIM.*, or the task's own."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from launcher.errors import UsageError
from launcher.optim.optimizers import build_optimizers
from tests.engine.helpers import config


class Own:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def build_optimizer(self, model: nn.Module) -> Any:
        return self.answer(model.parameters())


@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        (
            "LR=0.3 MOMENTUM=0.8 WEIGHT_DECAY=0.01",
            SGD,
            {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "nesterov": False, "fused": True},
        ),
        ("NESTEROV=true", SGD, {"nesterov": True, "momentum": 0.9}),
        (
            "NAME=adamw LR=1e-3 BETAS=[0.8,0.9]",
            AdamW,
            {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0, "fused": True},
        ),
        ("NAME=adamw EPS=1e-6 WEIGHT_DECAY=0.05", AdamW, {"eps": 1e-6, "weight_decay": 0.05}),
    ],
)
def test_optimiser_of_a_config(words: str, kind: type, options: dict[str, Any]) -> None:
    cfg = config(*(f"OPTIM.{word}" for word in words.split()))
    optimizer = build_optimizers(cfg, object(), nn.Linear(2, 2))[""]
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizers(config(), object(), model)[""].param_groups
    assert [id(p) for p in group["params"]] == [id(model.weight)]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(1, 1).requires_grad_(False)])
def test_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="no parameter to train"):
        build_optimizers(config(), object(), model)[""]


def test_the_tasks_own_wins() -> None:
    optimizer = build_optimizers(config(), Own(torch.optim.Adagrad), nn.Linear(1, 1))[""]
    assert isinstance(optimizer, torch.optim.Adagrad)


def test_the_tasks_own_must_be_an_optimiser() -> None:
    with pytest.raises(UsageError, match=r"Own\.build_optimizer must return .* not list"):
        build_optimizers(config(), Own(list), nn.Linear(1, 1))[""]


@pytest.mark.parametrize("words", [["NAME", "adamw"], ["WEIGHT_DECAY", "0.1"]])
def test_sparse_gradients_are_refused_where_no_kernel_takes_them(words: list[str]) -> None:
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))
    with pytest.raises(
        UsageError, match=r"OPTIM\.NAME sgd without OPTIM\.WEIGHT_DECAY.*SparseAdam"
    ):
        build_optimizers(config(f"OPTIM.{words[0]}", words[1]), object(), model)[""]
    optimizer = build_optimizers(config(), object(), model)[""]
    assert type(optimizer) is SGD and not optimizer.param_groups[0]["fused"]
