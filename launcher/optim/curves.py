"""The courses of rates, momenta and weight decays: pure functions of progress. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from launcher.config import CfgNode
from launcher.errors import UsageError
from launcher.runtime.progress import in_steps

# The factor of a base value at a share, 0 to 1, of the way from the warm-up's end to the horizon.
Factor = Callable[[float], float]
# The keys by which something that had a course may have none.
SCHEDULED = (
    *("OPTIM.SCHEDULE", "OPTIM.WARMUP", "OPTIM.MOMENTUM_SCHEDULE", "OPTIM.WEIGHT_DECAY_SCHEDULE"),
)
# How far beside a whole number of periods a share still counts as one: less than any step.
NEAR = 1e-9


def constant() -> Factor:
    return lambda done: 1.0


def linear(final: float) -> Factor:
    return lambda done: 1.0 + (final - 1.0) * done


def cosine(final: float) -> Factor:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, "SGDR", ICLR 2017, no restarts)."""
    return lambda done: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def restarts(final: float, period: float, growth: float) -> Factor:
    """That again and again: the first one takes a share `period`, each next one `growth` times as
    long. At the very end it is that of the cycle that ends there."""
    shape = cosine(final)

    def factor(done: float) -> float:
        cycles = done / period
        if growth > 1:
            cycles = math.log1p(cycles * (growth - 1)) / math.log(growth)
        number = math.ceil(cycles - NEAR) - 1 if done >= 1 else math.floor(cycles + NEAR)
        begun = number * period
        if growth > 1:
            begun = period * (growth**number - 1) / (growth - 1)
        return shape(min(max((done - begun) / (period * growth**number), 0.0), 1.0))

    return factor


def step(milestones: Sequence[float], gamma: float) -> Factor:
    """`gamma` once more for every milestone passed; milestones are shares of the same way."""
    return lambda done: gamma ** sum(done >= milestone for milestone in milestones)


def every(period: float, gamma: float) -> Factor:
    """`gamma` once more after every `period`, a share of the same way."""
    return lambda done: gamma ** math.floor(done / period + NEAR)


def exponential(period: float, gamma: float) -> Factor:
    """Smoothly `gamma` once more in every `period`."""
    return lambda done: gamma ** (done / period)


def polynomial(final: float, power: float) -> Factor:
    return lambda done: final + (1.0 - final) * (1.0 - done) ** power


def one_cycle(start: float, final: float, peak: float) -> Factor:
    """Half a cosine up from `start` to 1 at the share `peak`, and another one down to `final`
    (Smith and Topin, "Super-Convergence", 2018)."""
    up, down = cosine(start), cosine(final)
    return lambda done: up(1 - done / peak) if done < peak else down((done - peak) / (1 - peak))


def inverse_sqrt(period: float) -> Factor:
    """As 1 over the root of the steps, if there have been `period` before (Vaswani et al.,
    "Attention Is All You Need", 2017)."""
    return lambda done: math.sqrt(period / (period + done))


def stable_decay(final: float, decay: float, shape: str) -> Factor:
    """1, and in the last share `decay` from there to `final` (Hu et al., "MiniCPM", 2024)."""
    shapes: dict[str, Factor] = {
        "linear": linear(final),
        "cosine": cosine(final),
        "sqrt": lambda done: 1.0 + (final - 1.0) * math.sqrt(done),
    }
    begin, falling = 1.0 - decay, shapes[shape]
    # What is left of it, since 1 - (1 - decay) is not the same.
    return lambda done: falling(1.0 - (1.0 - done) / decay) if done > begin else 1.0


def bump(factor: float, peak: float) -> Factor:
    """1 at both ends and `factor` at `peak`: against the rate in one cycle."""
    there, back = cosine(factor), cosine(factor)
    return lambda done: there(done / peak) if done < peak else back((1 - done) / (1 - peak))


class Course:
    """The factor for each optimiser step: first the warm-up, which rises linearly to where the
    schedule begins, then the schedule, from the warm-up's end to the horizon, and its last value
    after that. They are never multiplied, so the full rate is reached.
    """

    def __init__(
        self,
        factor: Factor,
        total_steps: int,
        warmup_steps: int = 0,
        own: Callable[[int, int], float] | None = None,
        floor: float = 0.0,
    ) -> None:
        """`own` takes the factor's place: by steps done since the warm-up's end, and how many there
        are."""
        self.factor, self.own, self.floor = factor, own, floor
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        # Where the warm-up leads: one cycle begins below the full rate.
        self.start = 1.0 if own else max(factor(0.0), floor)

    def __call__(self, step: int) -> float:
        """The factor for the update that follows `step` updates."""
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1) * self.start
        if self.own:
            found = self.own(step - warmup, self.total_steps - warmup)
            return max(found, self.floor) if self.floor else found
        return max(self.factor(self.share(step)), self.floor)

    def share(self, step: int) -> float:
        """How much of the way from the warm-up's end to the horizon is done."""
        done, left = step - self.warmup_steps, self.total_steps - self.warmup_steps
        return min(max(done, 0) / max(left, 1), 1.0)


def course(
    cfg: CfgNode, steps_per_epoch: int, own: Callable[[int, int], float] | None = None
) -> Course:
    """That of the rate, as OPTIM.* describes it; `own` is the task's."""
    optim, end = cfg.OPTIM, cfg.OPTIM.HORIZON or cfg.TRAIN.DURATION
    total, warmup, period, decay, *milestones = (
        in_steps(text, steps_per_epoch)
        for text in (end, optim.WARMUP, optim.PERIOD, optim.DECAY, *optim.MILESTONES)
    )
    left, final = max(total - warmup, 1), optim.FINAL_FACTOR
    if optim.SCHEDULE == "wsd" and decay > left:
        raise UsageError(
            f"OPTIM.DECAY {optim.DECAY} is {decay} steps, but the schedule has {left} after warm-up"
        )
    shares = [(milestone - warmup) / left for milestone in milestones]
    factors: dict[str, Callable[[], Factor]] = {
        "constant": constant,
        "linear": lambda: linear(final),
        "cosine": lambda: (
            restarts(final, period / left, optim.PERIOD_GROWTH) if period else cosine(final)
        ),
        "step": lambda: every(period / left, optim.GAMMA) if period else step(shares, optim.GAMMA),
        "multistep": lambda: step(shares, optim.GAMMA),
        "exponential": lambda: exponential(period / left, optim.GAMMA),
        "polynomial": lambda: polynomial(final, optim.POWER),
        "onecycle": lambda: one_cycle(optim.START_FACTOR, final, optim.PEAK),
        "invsqrt": lambda: inverse_sqrt((period or warmup) / left),
        "wsd": lambda: stable_decay(final, decay / left, optim.DECAY_SHAPE),
    }
    return Course(factors[optim.SCHEDULE](), total, warmup, own, optim.FLOOR)


def others(cfg: CfgNode) -> dict[str, Factor]:
    """Those of what else a group of weights has, over the same way; of what is not constant."""
    optim = cfg.OPTIM
    found = {
        "momentum": (optim.MOMENTUM_SCHEDULE, optim.MOMENTUM_FACTOR),
        "weight_decay": (optim.WEIGHT_DECAY_SCHEDULE, optim.WEIGHT_DECAY_FACTOR),
    }
    kinds: dict[str, Callable[[float], Factor]] = {
        "linear": linear,
        "cosine": cosine,
        "onecycle": lambda factor: bump(factor, optim.PEAK),
    }
    return {key: kinds[kind](final) for key, (kind, final) in found.items() if kind != "constant"}


def scaled(cfg: CfgNode, rate: float) -> float:
    """A rate of the config at this global batch (Goyal et al., "Accurate, Large Minibatch SGD",
    2017; by the root: Krizhevsky, "One weird trick", 2014)."""
    if not cfg.OPTIM.LR_SCALING:
        return rate
    ratio = cfg.TRAIN.BATCH_SIZE / cfg.OPTIM.LR_BATCH
    return rate * (ratio if cfg.OPTIM.LR_SCALING == "linear" else math.sqrt(ratio))
