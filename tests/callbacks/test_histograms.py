"""Histograms of weights and gradients: when they are due, and of what."""

import pytest
import torch
from torch import nn

from launcher.callbacks.histograms import Histograms
from launcher.data.plan import Plan
from launcher.runtime.topology import Topology
from launcher.tasks.pictures import BUCKETS
from launcher.telemetry.media import Media, OnHost
from tests.callbacks.helpers import view


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    made[1].requires_grad_(False)
    with torch.no_grad():
        made[0].weight.copy_(torch.arange(6).view(2, 3))
        made[0].bias.fill_(7)
    made(torch.ones(1, 3)).sum().backward()
    made[0].bias.grad = None  # as of a weight that a step does not use
    return made


def run(period: str, steps: int, skipped: tuple[int, ...] = (), rank: int = 0) -> list[Media]:
    """Steps of 4 samples, epochs of 10; a skipped one comes again."""
    shown: list[Media] = []
    parts = {"model": model(), "show": shown.append, "plan": Plan(10, 4)}
    look = view(**parts, topology=Topology(rank, world_size=2), HISTOGRAMS=period)
    histograms = Histograms(look)
    for number in range(steps):
        start, stop = look.data.train_plan.batch(number % 3)
        histograms.before_step(stop - start)
        histograms.on_gradients()
        look.progress.advance(stop - start, 10, number in skipped)
        if number not in skipped:
            histograms.on_step()
    return shown


@pytest.mark.parametrize(
    ("period", "due"), [("", []), ("2step", [2, 4, 6]), ("1ep", [3, 6]), ("1step", [*range(1, 7)])]
)
def test_when(period: str, due: list[int]) -> None:
    assert [media.step for media in run(period, 6)] == due


def test_a_skipped_step_shows_nothing() -> None:
    assert [media.step for media in run("2step", 6, skipped=(1, 2))] == [2, 4]


def test_what() -> None:
    media = run("1step", 1)[0]
    assert media.names == ["gradients/0.weight", "weights/0.weight", "weights/0.bias"]
    assert isinstance(media.value, OnHost)
    low, high, *_ = weight = media.value.read()[1]
    assert (low, high, weight[-BUCKETS:].sum()) == (0, 5, 6)


def test_another_rank_does_nothing() -> None:
    assert run("1step", 2, rank=1) == []
