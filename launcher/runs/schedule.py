"""The course that rates will take, drawn from a config before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from launcher.config import CfgNode, load_config
from launcher.config.checks import in_epochs
from launcher.config.optim import COUNT
from launcher.data.plan import Plan
from launcher.errors import UsageError
from launcher.optim.curves import course, others, scaled
from launcher.runs import terminal
from launcher.runs.index import Series
from launcher.runs.plot import POINTS, picture
from launcher.runs.records import Array
from launcher.runtime.progress import in_steps

TIMES = ("TRAIN.DURATION", "OPTIM.")  # the keys that a course goes by
# By name, the steps and the values of their updates.
Curves = dict[str, tuple[Array, Array]]


def curves(config: str, overrides: Sequence[str], length: int | None) -> Curves:
    """Those of the rate, as train/lr is recorded, and of what else has a course, over
    TRAIN.DURATION. Raises UsageError where the number of steps does not follow from the config and
    the `length` of the training data."""
    cfg = load_config(config, overrides, require_task=False).cfg
    epochs = [key for key in in_epochs(cfg) if key.startswith(TIMES)]
    if epochs and not length:
        raise UsageError(
            f"{', '.join(epochs)} count epochs: give the samples in the training data, --length N"
        )
    plan = Plan(length or 1, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.DROP_LAST and bool(length))
    total = in_steps(cfg.TRAIN.DURATION, plan.steps_per_epoch)
    rate, steps = course(cfg, plan.steps_per_epoch), _places(total)
    found = {"train/lr": scaled(cfg, cfg.OPTIM.LR) * np.array([rate(s) for s in steps - 1])}
    for name, factor in others(cfg).items():
        found[name] = _base(cfg, name) * np.array([factor(rate.share(s)) for s in steps - 1])
    return {name: (steps, values) for name, values in found.items()}


def drawn(found: Curves, width: int) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = []
    for name, (steps, values) in found.items():
        series = Series()
        series.extend(steps.astype(float), values)
        first, last = (terminal.number(float(values[i])) for i in (0, -1))
        told = f"  {first} at first, {last} at last, at most {terminal.number(values.max())}"
        parts += [Text(name, "bold").append(told, ""), *map(Text, terminal.plot(series, width))]
    parts.append(Text("As OPTIM.* says it: a task's own schedule or optimiser is not asked."))
    return Group(*parts)


def plot(found: Curves, output: Path) -> None:
    """As a picture, a panel a curve."""
    with picture(list(found), "step", output) as panels:
        for axes, (steps, values) in zip(panels, found.values(), strict=True):
            axes.plot(steps, values)


def _places(total: int) -> Array:
    """The steps that are drawn: all, or so many, the first and last among them."""
    return np.unique(np.linspace(1, total, min(total, POINTS)).astype(np.int64))


def _base(cfg: CfgNode, name: str) -> float:
    """What the course of a momentum or a weight decay goes from."""
    betas = name == "momentum" and "BETAS" in COUNT.get(cfg.OPTIM.NAME, ())
    return cfg.OPTIM.BETAS[0] if betas else cfg.OPTIM[name.upper()]
