"""FLOPs counted without a trace, and their share of the peak."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.callbacks.throughput import Throughput, known_peak, peak
from launcher.runtime.topology import Topology
from tests.callbacks.helpers import CPU, view


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 4, 3, bias=False), nn.Dropout(0.5)
        self.norm, self.linear = nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.norm(self.conv(x))).flatten(1))


def trained(throughput: Throughput) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All weights, buffers and gradients after two steps, and the random state."""
    torch.manual_seed(3)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        throughput.before_step(8)
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        throughput.on_gradients()
        optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.state_dict().values(), *gradients], torch.get_rng_state()


def test_counting_leaves_no_trace() -> None:
    counted = Throughput(view(COUNT_FLOPS=True))
    plain = Throughput(view())
    (ours, our_state), (theirs, their_state) = trained(counted), trained(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(our_state, their_state)
    # Two a product and sum; the first layer's input needs no gradient, the second's does.
    conv, linear = 2 * 36 * 9 * 4, 2 * 4 * 36 * 10
    assert counted.per_sample == 2 * conv + 3 * linear
    assert plain.per_sample is None and plain.figures({"perf/samples_per_s": 5.0}, []) == {}


def counting(*samples: int, **options: Any) -> Throughput:
    """After steps with so many samples, each of 16 FLOPs."""
    throughput = Throughput(view(COUNT_FLOPS=True, **options))
    for number in samples:
        throughput.before_step(number)
        torch.ones(2, 2) @ torch.ones(2, 2)
        throughput.on_gradients()
    return throughput


def test_a_step_without_samples_is_not_the_one_that_is_counted() -> None:
    assert counting(0, 2).per_sample == 8


def test_the_tasks_own_word_counts() -> None:
    task, ranks = SimpleNamespace(flops=lambda: 2e9), Topology(world_size=4)
    told = counting(1, task=task, topology=ranks, PEAK_TFLOPS=3.0)
    figures = told.figures({"perf/samples_per_s": 3000.0}, [])
    assert figures == {"perf/flops_per_s": 6e12, "perf/mfu": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 494),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L40", "fp16", None),
        ("NVIDIA A10G", "fp16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peaks(name: str, precision: str, tflops: float | None) -> None:
    assert known_peak(name, precision) == (None if tflops is None else tflops * 1e12)


def test_no_peak_of_a_cpu_but_the_users() -> None:
    assert peak(CPU, "fp32") is None
    assert peak(CPU, "fp32", 0.5) == 5e11
