"""Schedules as pure functions of the share of the run done, and of the step."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.plan import Plan
from launcher.edges.optimizer import rescale
from launcher.errors import RunError
from launcher.optim import curves as schedule
from launcher.optim.curves import Factor
from launcher.optim.schedules import Schedule, build_schedule
from tests.engine.helpers import Regression, Trainer, assert_close, config, drawn


@settings(deadline=None)
@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    final=st.floats(0, 1),
    kind=st.sampled_from([schedule.linear, schedule.cosine]),
)
def test_warm_up_rises_and_the_rest_falls(
    total: int, warmup: int, final: float, kind: Callable[[float], Factor]
) -> None:
    made = Schedule(kind(final), total, warmup)
    values = [made(step) for step in range(total + 3)]
    assert all(0 <= value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    # Never multiplied: the schedule begins where the warm-up ends, at the full rate.
    left = max(total - warmup, 1)
    assert after == [kind(final)(min(s / left, 1)) for s in range(total + 3 - warmup)]


# 12 steps an epoch, 48 in all.
@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("SCHEDULE=constant", {0: 1, 24: 1, 48: 1}),
        ("SCHEDULE=linear", {0: 1, 12: 0.75, 24: 0.5, 48: 0}),
        ("SCHEDULE=linear FINAL_FACTOR=0.2", {0: 1, 24: 0.6, 48: 0.2}),
        ("SCHEDULE=cosine", {0: 1, 16: 0.75, 24: 0.5, 32: 0.25, 48: 0}),
        ("SCHEDULE=cosine FINAL_FACTOR=0.1", {0: 1, 24: 0.55, 48: 0.1}),
        (
            "SCHEDULE=step MILESTONES=[1ep,30step] GAMMA=0.5",
            {0: 1, 11: 1, 12: 0.5, 29: 0.5, 30: 0.25, 48: 0.25},
        ),
        ("WARMUP=1ep", {0: 1 / 13, 11: 12 / 13, 12: 1}),
        ("WARMUP=4step", {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1, 5: 1}),
        ("WARMUP=1ep SCHEDULE=cosine", {11: 12 / 13, 12: 1, 30: 0.5, 48: 0}),
        ("WARMUP=1ep SCHEDULE=step MILESTONES=[2ep]", {12: 1, 23: 1, 24: 0.1}),
    ],
)
def test_schedule_of_a_config(words: str, values: dict[int, float]) -> None:
    keys = [f"OPTIM.{word}" for word in words.split()]
    made = build_schedule(config("TRAIN.DURATION=4ep", *keys), object(), Plan(96, 8))
    assert {step: made(step) for step in values} == pytest.approx(values, abs=1e-12)


def test_apply_keeps_the_ratio_of_the_groups() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.4, 0.1)]
    optimizer = torch.optim.SGD(groups)
    made = Schedule(schedule.linear(0), 10)
    for step in (0, 5, 9, 2):  # rates come from the step alone, in any order
        made.apply(optimizer, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.4 * (1 - step / 10), 0.1 * (1 - step / 10)])


def test_apply_takes_a_rescaling_and_no_second_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    made, (group,) = Schedule(schedule.linear(0), 10), optimizer.param_groups
    made.apply(optimizer, 0)
    rescale(optimizer, 0.5)
    made.apply(optimizer, 5)
    assert group["lr"] == pytest.approx(0.1)
    group["lr"] = 0.3
    with pytest.raises(RunError, match=r"changed between steps, to 0\.3, but OPTIM\.SCHEDULE"):
        made.apply(optimizer, 6)


class Drops(Regression):
    """Falls slowly, and from its half on has a third of the rate."""

    def schedule(self, step: int, total: int) -> float:
        assert 0 <= step < total
        return 1 / 3 if 2 * step >= total else 1 - step / 40


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_tasks_schedule_trains_as_plain_torch_with_the_same_rates(warmup: int) -> None:
    words = ("OPTIM.LR", 0.2, "TRAIN.DURATION", "10step")
    trainer = Trainer(Drops(), *words, "OPTIM.WARMUP", f"{warmup}step" if warmup else "")
    task, plan, progress = trainer.task, trainer.plan, trainer.state.progress
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    left, found = 10 - warmup, []
    for step in range(10):
        trainer.one(step)
        (group,) = trainer.state.optimizers[""].param_groups
        found.append(group["lr"])
        progress.step += 1
        # Written down once more, by hand.
        after = step - warmup
        factor = (step + 1) / (warmup + 1) if after < 0 else 1 - after / 40
        if 2 * after >= left:
            factor = 1 / 3
        optimizer.param_groups[0]["lr"] = 0.2 * factor
        epoch, k = divmod(step, plan.steps_per_epoch)
        optimizer.zero_grad()
        task.train_step(model, drawn(task, epoch, *plan.batch(k)))["loss"].backward()
        optimizer.step()
        assert found[-1] == optimizer.param_groups[0]["lr"], step
    assert_close(trainer.weights, list(model.parameters()))
    assert len(set(found)) > 4


class Says:
    def __init__(self, value: object) -> None:
        self.value = value

    def schedule(self, step: int, total: int) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def own(value: object, phase: str = "") -> Schedule:
    return build_schedule(config("TRAIN.DURATION=9step"), Says(value), Plan(96, 8), phase)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_factor_may_be_any_number(value: object) -> None:
    assert own(value)(3) == 0.5 and not own(value).steady


def test_with_several_optimisers_each_has_the_factor_of_its_phase() -> None:
    both = {"generator": 0.25, "critic": np.float64(1)}
    assert own(both, "generator")(3) == 0.25 and own(both, "critic")(3) == 1
    assert own(0.5, "critic")(3) == 0.5
    with pytest.raises(RunError, match=r"a finite number, or a dict with one for 'other'"):
        own(both, "other")(3)
    with pytest.raises(RunError, match=r"returned \{'generator'.*is a finite number$"):
        own(both)(3)


@pytest.mark.parametrize("value", [None, float("nan"), np.inf, "0.1", [1.0], 1j, {"": -np.inf}])
def test_a_factor_that_is_none_is_told_with_what_is_needed(value: object) -> None:
    with pytest.raises(RunError) as error:
        own(value)(3)
    told = f"Says.schedule(3, 9) returned {value!r}: the factor of the learning rate is a finite"
    assert str(error.value).startswith(told)


def test_an_error_of_a_schedule_is_told_with_its_call() -> None:
    with pytest.raises(KeyError) as error:
        own(KeyError("x"))(4)
    assert error.value.__notes__ == ["in Says.schedule(4, 9)"]  # type: ignore[attr-defined]
