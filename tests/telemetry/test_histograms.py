"""Histograms of weights and gradients: when they are due, and of what."""

import pytest
import torch
from torch import nn

from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.histograms import Histograms
from launcher.telemetry.media import Media, OnHost, buckets
from launcher.telemetry.recorder import Recorder, Sink

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))


class Shown(Sink):
    def __init__(self) -> None:
        self.media: list[Media] = []

    def show(self, media: Media) -> None:
        self.media.append(media)


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
    shown, net, progress = Shown(), model(), Progress()
    histograms = Histograms(period, net, Recorder(ALONE, shown))
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
    weight = buckets(media.value.read()[1])
    assert weight is not None
    assert (weight[0, 0], weight[-1, 1], weight[:, 2].sum()) == (0, 5, 6)


def test_ranks_without_a_sink_do_nothing() -> None:
    histograms = Histograms("1step", model(), Recorder(ALONE))
    histograms.prepare(Progress(), 4, 10)
    histograms.gradients()
    histograms.show(1)
    assert histograms.found == {}
