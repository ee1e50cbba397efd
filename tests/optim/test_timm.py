"""Schedules and groups beside timm's own, which is installed without what it depends on: its
schedulers and groups need torch alone, the rest of it torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from launcher.data.plan import Plan
from launcher.optim.optimizers import build_optimizers
from launcher.optim.schedules import build_schedule
from tests.engine.helpers import config

FOUND = importlib.util.find_spec("timm")
pytestmark = pytest.mark.skipif(FOUND is None, reason="timm is not installed (make installs it)")
STEPS, RATE = 120, 0.4


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports parts of timm by themselves."""
    assert FOUND is not None and FOUND.origin is not None
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("timm", "timm.models", "timm.scheduler", "timm.optim"):
        empty: Any = ModuleType(name)
        empty.__path__ = [str(Path(FOUND.origin).parent.joinpath(*name.split(".")[1:]))]
        empty.group_parameters = lambda model, matcher, **_: matcher
        monkeypatch.setitem(sys.modules, name, empty)
    yield lambda name: importlib.import_module(f"timm.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        sys.modules.pop(name)


CASES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "cosine": ("cosine_lr", "CosineLRScheduler", {"t_initial": STEPS}, ["SCHEDULE=cosine"]),
    "cosine down to a floor": (
        *("cosine_lr", "CosineLRScheduler"),
        {"t_initial": STEPS, "lr_min": 0.1 * RATE},
        ["SCHEDULE=cosine", "FINAL_FACTOR=0.1"],
    ),
    "restarts that grow": (
        *("cosine_lr", "CosineLRScheduler"),
        {"t_initial": 8, "cycle_mul": 2.0, "cycle_limit": 99},
        ["SCHEDULE=cosine", "PERIOD=8step", "PERIOD_GROWTH=2"],
    ),
    "step": (
        *("step_lr", "StepLRScheduler"),
        {"decay_t": 30, "decay_rate": 0.3},
        ["SCHEDULE=step", "PERIOD=30step", "GAMMA=0.3"],
    ),
    "multistep": (
        *("multistep_lr", "MultiStepLRScheduler"),
        {"decay_t": [41, 71], "decay_rate": 0.2},  # timm's is a step early, unlike its `step`
        ["SCHEDULE=multistep", "MILESTONES=[40step,70step]", "GAMMA=0.2"],
    ),
    "polynomial": (
        *("poly_lr", "PolyLRScheduler"),
        {"t_initial": STEPS, "power": 0.9, "lr_min": 0.05 * RATE},
        ["SCHEDULE=polynomial", "POWER=0.9", "FINAL_FACTOR=0.05"],
    ),
    "warm-up, stable, decay": (
        *("wsd_lr", "WSDLRScheduler"),
        {"t_initial": STEPS, "decay_t": 24, "decay_fn": "1-sqrt"},
        ["SCHEDULE=wsd", "DECAY=24step", "DECAY_SHAPE=sqrt"],
    ),
}


@pytest.mark.parametrize(("module", "name", "theirs", "ours"), CASES.values(), ids=CASES)
def test_a_schedule_is_that_of_timm(
    module: str, name: str, theirs: dict[str, Any], ours: list[str], timm: Any
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    there = getattr(timm(f"scheduler.{module}"), name)(optimizer, **theirs, t_in_epochs=False)
    keys = [f"OPTIM.{word}" for word in (f"LR={RATE}", *ours)]
    here = build_schedule(config(f"TRAIN.DURATION={STEPS}step", *keys), object(), Plan(80, 8))
    rates = []
    for step in range(1, STEPS):
        there.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert [RATE * here(step) for step in range(1, STEPS)] == pytest.approx(rates, rel=1e-12)
    assert len({round(rate, 12) for rate in rates}) > 1


class Tower(nn.Module):
    """Of the shape of timm's transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in "123")
        self.head = nn.Linear(4, 2)

    def group_matcher(self, coarse: bool) -> dict[str, int]:
        """What timm makes of it: the embedding, each block, the head."""
        order = ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
        names = [name for name, _ in self.named_parameters()]
        return {n: next(i for i, at in enumerate(order) if n.startswith(at)) for n in names}


def test_rates_and_decay_by_layer_are_those_of_timm(timm: Any) -> None:
    model = Tower()
    names = {id(p): name for name, p in model.named_parameters()}
    make = timm("optim._param_groups").param_groups_layer_decay
    wanted = {
        names[id(p)]: (RATE * group["lr_scale"], group["weight_decay"])
        for group in make(model, weight_decay=0.05, layer_decay=0.65)
        for p in group["params"]
    }
    words = ["LAYER_DECAY=0.65", "WEIGHT_DECAY=0.05", "SKIP_NORM_DECAY=True", f"LR={RATE}"]
    (optimizer,) = build_optimizers(
        config(*(f"OPTIM.{word}" for word in words)), object(), model
    ).values()
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == wanted.keys() and len({rate for rate, _ in found.values()}) == 5
    for name, (rate, decay) in wanted.items():
        assert found[name] == (pytest.approx(rate, rel=1e-12), decay), name
