"""Courses of rates, step by step against torch's own schedulers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as theirs

from launcher.data.plan import Plan
from launcher.errors import UsageError
from launcher.optim.curves import course, every, restarts, scaled
from launcher.optim.schedules import build_schedule
from tests.engine.helpers import config

LR = 0.3
Made = Callable[[Optimizer, int, random.Random], tuple[Any, str]]


def rates(make: Callable[[Optimizer], Any], steps: int) -> list[float]:
    """Those of a scheduler of torch's."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(words: str, steps: int) -> list[float]:
    made = build_schedule(
        config(f"OPTIM.LR={LR}", *(f"OPTIM.{word}" for word in words.split())),
        object(),
        Plan(96, 8),
    )
    optimizer, found = SGD([torch.zeros(1, requires_grad=True)], lr=LR), []
    for step in range(steps):
        made.apply(optimizer, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def constant(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    return theirs.ConstantLR(o, factor=1.0), "SCHEDULE=constant"


def linear(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    final = draw.random()
    return theirs.LinearLR(o, 1.0, final, left), f"SCHEDULE=linear FINAL_FACTOR={final}"


def cosine(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    final = draw.random()
    words = f"SCHEDULE=cosine FINAL_FACTOR={final}"
    return theirs.LambdaLR(
        o, lambda s: final + (1 - final) * (1 + math.cos(math.pi * min(s / left, 1))) / 2
    ), words


def cosine_restarts(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    period, growth, final = draw.randint(1, left), draw.randint(1, 3), draw.random()
    words = f"SCHEDULE=cosine PERIOD={period}step PERIOD_GROWTH={growth} FINAL_FACTOR={final}"
    return theirs.CosineAnnealingWarmRestarts(o, period, growth, eta_min=LR * final), words


def step(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    period, gamma = draw.randint(1, left), draw.random()
    return theirs.StepLR(o, period, gamma), f"SCHEDULE=step PERIOD={period}step GAMMA={gamma}"


def exponential(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    gamma, period = 0.5 + draw.random() / 2, draw.randint(1, 9)
    words = f"SCHEDULE=exponential PERIOD={period}step GAMMA={gamma}"
    return theirs.ExponentialLR(o, gamma ** (1 / period)), words


def polynomial(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    power = 0.5 + 2 * draw.random()
    return theirs.PolynomialLR(o, left, power), f"SCHEDULE=polynomial POWER={power}"


def wsd(o: Optimizer, left: int, draw: random.Random) -> tuple[Any, str]:
    decay, final = draw.randint(1, left), draw.random()
    stable = theirs.ConstantLR(o, factor=1.0)
    falls = theirs.LinearLR(o, 1.0, final, decay)
    o.param_groups[0]["lr"] = LR  # which the constructors have moved
    both: Any = theirs.SequentialLR(o, [stable, falls], [left - decay]) if left > decay else falls
    return both, f"SCHEDULE=wsd DECAY={decay}step FINAL_FACTOR={final}"


ALL: list[Made] = [constant, linear, cosine_restarts, step, exponential, polynomial, wsd, cosine]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("seed", range(8))
def test_rates_are_those_of_torch(make: Made, seed: int) -> None:
    draw = random.Random(seed)
    left, told = draw.randint(2, 80), list[str]()

    def scheduler(o: Optimizer) -> Any:
        made, words = make(o, left, draw)
        told.append(words)
        return made

    expected = rates(scheduler, left)
    assert ours(f"{told[0]} HORIZON={left}step", left) == pytest.approx(expected, rel=1e-9)
    # Warm-up comes before it, and is not multiplied into it: the same rates, so much later.
    warmup = draw.randint(1, 20)
    rises = rates(lambda o: theirs.LinearLR(o, 1 / (warmup + 1), 1.0, warmup), warmup)
    words = f"{told[0]} WARMUP={warmup}step HORIZON={left + warmup}step"
    assert ours(words, left + warmup) == pytest.approx(rises + expected, rel=1e-9)


def test_periods_end_at_their_very_step() -> None:
    """Shares of the way are no exact numbers."""
    for left in range(1, 60):
        for period in range(1, left + 1):
            drops, cycles = every(period / left, 0.5), restarts(0.0, period / left, 1.0)
            for step in range(left):
                assert drops(step / left) == 0.5 ** (step // period), (left, period, step)
                done = (step % period) / period
                value = (1 + math.cos(math.pi * done)) / 2
                assert cycles(step / left) == pytest.approx(value, abs=1e-9), (left, period, step)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_a_cosine_is_torchs(final: float) -> None:
    """Which goes from its own rate before, and up again after its end."""
    expected = rates(lambda o: theirs.CosineAnnealingLR(o, 37, LR * final), 38)
    found = ours(f"SCHEDULE=cosine HORIZON=37step FINAL_FACTOR={final}", 38)
    assert found == pytest.approx(expected, abs=1e-12)


def test_milestones_are_torchs_and_count_from_the_runs_start() -> None:
    expected = rates(lambda o: theirs.MultiStepLR(o, [7, 19, 20], 0.3), 40)
    for name in ("multistep", "step"):
        words = f"SCHEDULE={name} MILESTONES=[7step,19step,20step] GAMMA=0.3"
        assert ours(f"{words} HORIZON=40step", 40) == pytest.approx(expected, rel=1e-12)
        warm = ours(f"{words} HORIZON=40step WARMUP=5step", 40)
        assert warm[5:] == pytest.approx(expected[5:], rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_one_cycle_is_torchs_with_its_momentum(seed: int) -> None:
    """Torch has its peak and its end in a step of their own, one earlier than a share of all."""
    draw = random.Random(seed)
    total, share, start = (
        draw.randint(20, 90),
        0.2 + draw.random() / 2,
        1 / (2 + 30 * draw.random()),
    )
    torchs = SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    scheduler = theirs.OneCycleLR(
        *(torchs, LR, total, None, None, share),
        base_momentum=0.8,
        max_momentum=0.9,
        div_factor=1 / start,
        final_div_factor=10,
    )
    mine = SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    words = (
        *("SCHEDULE=onecycle", f"START_FACTOR={start!r}", f"FINAL_FACTOR={start / 10!r}"),
        *(f"PEAK={(share * total - 1) / (total - 1)!r}", f"HORIZON={total - 1}step"),
        *("MOMENTUM_SCHEDULE=onecycle", f"MOMENTUM_FACTOR={0.8 / 0.9!r}"),
    )
    made = build_schedule(config(*(f"OPTIM.{w}" for w in words)), object(), Plan(96, 8))
    for step in range(total):
        made.apply(mine, step)
        for key in ("lr", "momentum"):
            expected = torchs.param_groups[0][key]
            assert mine.param_groups[0][key] == pytest.approx(expected, rel=1e-9), (key, step)
        torchs.step()
        scheduler.step()


def test_a_warm_up_leads_to_where_one_cycle_begins() -> None:
    found = ours("SCHEDULE=onecycle START_FACTOR=0.5 WARMUP=3step HORIZON=103step PEAK=0.3", 103)
    assert found[:4] == pytest.approx([LR * 0.125, LR * 0.25, LR * 0.375, LR * 0.5])
    assert max(found) == found[33] == LR


@pytest.mark.parametrize("words", ["WARMUP=9step", "PERIOD=9step", "PERIOD=9step WARMUP=4step"])
def test_inverse_square_root(words: str) -> None:
    warmup = 4 if "4" in words else 9 if "WARMUP" in words else 0
    found = ours(f"SCHEDULE=invsqrt {words} HORIZON=500step", 500)
    by_hand = [LR * math.sqrt(9 / (9 + step)) for step in range(500 - warmup)]
    assert found[warmup:] == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "value"), [("linear", 0.75), ("cosine", 0.8535533905932737), ("sqrt", 0.5)]
)
def test_shapes_of_the_last_decay(shape: str, value: float) -> None:
    words = f"SCHEDULE=wsd DECAY=8step DECAY_SHAPE={shape} HORIZON=20step"
    found = [rate / LR for rate in ours(words, 25)]
    assert found[:13] == [1.0] * 13 and found[14] == pytest.approx(value)
    assert found[20:] == pytest.approx([0.0] * 5)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "exponential PERIOD=1step"])
def test_no_schedule_goes_below_the_floor_and_the_warm_up_does(name: str) -> None:
    words = f"SCHEDULE={name} GAMMA=0.5 WARMUP=9step HORIZON=30step"
    plain, found = ours(words, 60), ours(f"{words} FLOOR=0.25", 60)
    assert found == plain[:9] + [max(rate, 0.25 * LR) for rate in plain[9:]]
    assert min(found[9:]) == 0.25 * LR and found[0] < 0.25 * LR < plain[9]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine PERIOD=10step", "wsd DECAY=5step"])
def test_after_the_horizon_the_last_value_stays(name: str) -> None:
    words = f"SCHEDULE={name} FINAL_FACTOR=0.1"
    found = ours(f"{words} HORIZON=20step", 50)
    assert found[20:] == pytest.approx([0.1 * LR] * 30)
    keys = [f"OPTIM.{word}" for word in words.split()]
    assert course(config("TRAIN.DURATION=50step", *keys), 12)(20) > 0.2


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_horizon_beyond_the_end_is_a_part_of_the_way(name: str) -> None:
    words = ("TRAIN.DURATION=10step", f"OPTIM.SCHEDULE={name}", "OPTIM.HORIZON=4ep")
    found = course(config(*words), 12)
    assert found(24) == pytest.approx(0.5) and found(10) > 0.7


def test_a_decay_longer_than_the_data_has_it_is_told() -> None:
    words = ("TRAIN.DURATION=2ep", "OPTIM.SCHEDULE=wsd", "OPTIM.DECAY=30step")
    with pytest.raises(UsageError, match="30step is 30 steps, but the schedule has 24"):
        course(config(*words), 12)


@pytest.mark.parametrize(("how", "value"), [("linear", 1.2), ("sqrt", 0.3 * 2)])
def test_rates_grow_with_the_global_batch(how: str, value: float) -> None:
    words = ("TRAIN.BATCH_SIZE=1024", "OPTIM.LR_BATCH=256", f"OPTIM.LR_SCALING={how}")
    assert scaled(config(*words), 0.3) == pytest.approx(value)
    assert scaled(config("TRAIN.BATCH_SIZE=1024"), 0.3) == 0.3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("key", "optimizer"), [("momentum", "sgd"), ("momentum", "adam"), ("weight_decay", "sgd")]
)
def test_momentum_and_weight_decay_have_a_course(kind: str, key: str, optimizer: str) -> None:
    name, factor = key.upper(), 1.08 if key == "momentum" else 10
    words = (f"{name}_SCHEDULE={kind}", f"{name}_FACTOR={factor}", "WARMUP=5step", "HORIZON=25step")
    cfg = config(*(f"OPTIM.{word}" for word in words))
    made = build_schedule(cfg, object(), Plan(96, 8))
    p = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([p], betas=(0.9, 0.95))
    o: Any = SGD([p], 0.1, 0.9, weight_decay=0.02) if optimizer == "sgd" else adam
    (group,), base = o.param_groups, 0.9 if key == "momentum" else 0.02
    for step in (0, 4, 5, 20, 13, 25, 99):  # from the step alone, in any order
        made.apply(o, step)
        share = min(max(step - 5, 0) / 20, 1)
        share = share if kind == "linear" else (1 - math.cos(math.pi * share)) / 2
        found = group[key] if key in group else group["betas"][0]
        assert found == pytest.approx(base * (1 + (factor - 1) * share)), step
    assert optimizer == "sgd" or group["betas"][1] == 0.95
