"""Histograms of weights and gradients: when they are due, and of what."""

import pytest
import torch
from torch import nn

from launcher.runtime.progress import Progress
from launcher.telemetry.histograms import Histograms
from launcher.telemetry.media import Media, OnHost
from tests.telemetry.helpers import recording


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    made[1].requires_grad_(False)
    with torch.no_grad():
        made[0].weight.copy_(torch.arange(6).view(2, 3))
        made[0].bias.fill_(7)
    made(torch.ones(1, 3)).sum().backward()
    made[0].bias.grad = None  # as of a weight that a step does not use
    return made


def run(period: str, steps: int, skipped: tuple[int, ...] = ()) -> list[Media]:
    """Steps of 4 samples, epochs of 10; a skipped one comes again."""
    (recorder, shown), progress = recording(), Progress()
    histograms = Histograms(period, model(), recorder)
    for number in range(steps):
        histograms.prepare(progress, 4, 10)
        histograms.gradients()
        progress.advance(4, 10, number in skipped)
        if number not in skipped:
            histograms.show(progress.step)
    return shown.media


@pytest.mark.parametrize(
    ("period", "due"), [("", []), ("2step", [2, 4, 6]), ("1ep", [3, 5]), ("1step", [*range(1, 7)])]
)
def test_when(period: str, due: list[int]) -> None:
    assert [media.step for media in run(period, 6)] == due


def test_a_skipped_step_shows_nothing() -> None:
    assert [media.step for media in run("2step", 6, skipped=(1, 2))] == [2, 4]


def test_what() -> None:
    media = run("1step", 1)[0]
    assert media.names == ["gradients/0.weight", "weights/0.weight", "weights/0.bias"]
    assert isinstance(media.value, OnHost)
    low, high, total, _, *counts = media.value.read()[1]
    assert (low, high, total, sum(counts)) == (0, 5, 15, 6)


def test_other_ranks_do_nothing() -> None:
    histograms = Histograms("1step", model(), recording(is_main=False)[0])
    histograms.prepare(Progress(), 4, 10)
    histograms.gradients()
    histograms.show(1)
    assert histograms.found == {}
