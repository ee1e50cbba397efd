"""Optimisers of any make, and who sets their rates."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from launcher.edges.optimizer import AROUND, check_optimizers, evaluated, rates, set_rate, update
from launcher.errors import RunError, UsageError
from launcher.optim.curves import constant, linear
from launcher.optim.schedules import Schedule


class TwoPasses(torch.optim.SGD):
    """As sharpness-aware minimisation."""

    def first_step(self) -> None: ...
    def second_step(self) -> None: ...


class Needs(torch.optim.SGD):
    def step(self, closure: Any) -> None: ...  # type: ignore[override]


class NeedsByName(torch.optim.SGD):
    def step(self, *, loss: Any) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize(
    "make", [TwoPasses, Needs, NeedsByName, lambda p, lr: torch.optim.LBFGS(p)]
)
def test_one_that_evaluates_the_model_several_times_is_refused(make: Any) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(UsageError, match="several times a step"):
        check_optimizers({"": make(model.parameters(), lr=0.1)}, model, "T.build_optimizer")


def test_a_scheduler_of_torchs_may_hold_the_optimiser() -> None:
    """It puts a wrapper in the place of its `step`."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    check_optimizers({"": optimizer}, model, "T.build_optimizer")


def test_groups_of_one_name_have_a_rate_each() -> None:
    groups = [{"lr": 0.1, "name": "a"}, {"lr": 0.2, "name": "a"}, {"lr": 0.3, "name": "b"}]
    found = rates({"": type("Made", (), {"param_groups": groups})()})
    assert found == {
        **{"train/lr": 0.1, "train/lr/a/0": 0.1, "train/lr/a/1": 0.2, "train/lr/b": 0.3}
    }


def test_weights_that_are_trained_by_nobody_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    check_optimizers({"": torch.optim.SGD(model[0].parameters(), 0.1)}, model, "T.build_optimizer")
    assert "never trained: 1.weight, 1.bias" in caplog.text and "2.weight" not in caplog.text


def test_a_layers_own_scale_counts_in_every_rate() -> None:
    groups = [{"lr": 0.1, "lr_scale": 0.5}, {"lr": 0.1}, {"momentum": 0.9}, {"lr": None}]
    for group in groups:
        set_rate(group, 0.2)
    assert [group.get("lr") for group in groups] == [pytest.approx(0.01), 0.1 * 0.2, None, None]
    optimizer = type("Made", (), {"param_groups": groups})()
    assert rates({"": optimizer}) == {
        "train/lr": groups[0]["lr"],
        "train/lr/0": groups[0]["lr"],
        "train/lr/1": groups[1]["lr"],
    }
    assert rates({"": type("None", (), {"param_groups": groups[2:]})()}) == {}


def test_a_rate_that_is_a_tensor_is_set_in_place() -> None:
    rate = torch.tensor(0.1)
    group: dict[str, Any] = {"lr": rate}
    set_rate(group, 0.5)
    set_rate(group, 0.25)
    assert group["lr"] is rate and rate.item() == pytest.approx(0.025)


def test_rates_that_a_task_sets_itself_stay_where_nothing_is_scheduled() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steady = Schedule(constant(), 10, steady=True)
    for step in range(3):
        steady.apply(optimizer, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_two_that_set_the_rate_are_told() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    schedule = Schedule(linear(0.0), 10)
    schedule.apply(optimizer, 0)
    schedule.apply(optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(RunError, match=r"changed between steps, to 0\.3.*OPTIM\.SCHEDULE constant"):
        schedule.apply(optimizer, 2)


def test_weights_are_back_bit_for_bit_after_an_evaluation() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()

    class Averages(torch.optim.SGD):
        def eval(self) -> None:
            model.weight.data.mul_(1 / 3)

        def train(self) -> None:
            model.weight.data.mul_(3)  # not the same bits

    with evaluated({"": Averages(model.parameters(), 0.1)}):
        assert torch.equal(model.weight, before * (1 / 3))
    assert torch.equal(model.weight, before)


class Slowed(torch.optim.SGD):
    """Somebody's own, on top of torch's."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= 0.5
        return super().step(closure)


def around() -> tuple[list[Any], Any]:
    """How often torch's wrapper is entered, once `sys.setprofile` has what comes along."""
    entered: list[Any] = []

    def look(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is AROUND:
            entered.append(frame)

    return entered, look


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, Slowed])
def test_an_update_is_that_of_step(make: Any) -> None:
    weights = [torch.arange(4.0).requires_grad_() for _ in range(2)]
    ours, theirs = (make([w], lr=0.1, weight_decay=0.2) for w in weights)
    for step in range(4):
        for w in weights:
            w.grad = torch.full((4,), step + 0.5)
        entered, look = around()
        sys.setprofile(look)
        update(ours)
        sys.setprofile(None)
        assert len(entered) == (make is Slowed)  # that of the class on which it stands
        theirs.step()
        assert torch.equal(*weights)


@pytest.mark.parametrize("who", ["own", "own after", "all", "all after", "scheduler", "a wrapper"])
def test_whoever_looks_at_steps_is_called(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer, called = torch.optim.SGD([weight], 0.1), []

    def look(*arguments: Any) -> None:
        called.append(len(arguments))

    if who == "scheduler":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    elif who == "a wrapper":  # as careful ones are made: with the marks of what they wrap
        step = torch.optim.SGD.step

        @functools.wraps(step)
        def wrapped(self: Any, closure: Any = None) -> Any:
            look()
            return step(self, closure)

        monkeypatch.setattr(torch.optim.SGD, "step", wrapped)
    else:
        handle = {
            "own": optimizer.register_step_pre_hook,
            "own after": optimizer.register_step_post_hook,
            "all": register_optimizer_step_pre_hook,
            "all after": register_optimizer_step_post_hook,
        }[who](look)
    weight.grad = torch.ones(1)
    update(optimizer)
    assert weight.item() == pytest.approx(0.9)
    if who == "scheduler":
        scheduler.step()  # torch warns where it sees no step before
        assert optimizer._opt_called  # type: ignore[attr-defined]
        return
    assert len(called) == 1
    if who != "a wrapper":
        handle.remove()
        update(optimizer)
        assert len(called) == 1


def test_torchs_profiler_sees_updates() -> None:
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], 0.1)
    with torch.profiler.profile() as told:
        update(optimizer)
    assert "Optimizer.step#SGD.step" in {event.key for event in told.key_averages()}


def test_one_of_no_class_of_torchs_is_stepped() -> None:
    class Own:
        __slots__ = ("steps",)
        steps: int

        def step(self) -> None:
            self.steps = 7

    own = Own()
    update(own)
    assert own.steps == 7
