"""FLOPs counted without a trace, their share of the peak, and the time to the end."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config import defaults
from launcher.telemetry.console import summary
from launcher.telemetry.throughput import Eta, Throughput, known_peak, peak

CPU = torch.device("cpu")


def config(**log: Any) -> Any:
    cfg = defaults()
    cfg.LOG.update(log)
    return cfg


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
        with throughput.step(8):
            model(torch.randn(8, 1, 8, 8)).square().mean().backward()
            optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.state_dict().values(), *gradients], torch.get_rng_state()


def test_counting_leaves_no_trace() -> None:
    counted = Throughput(config(COUNT_FLOPS=True), object(), CPU, 1)
    plain = Throughput(config(), object(), CPU, 1)
    (ours, our_state), (theirs, their_state) = trained(counted), trained(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(our_state, their_state)
    # Two a product and sum; the first layer's input needs no gradient, the second's does.
    conv, linear = 2 * 36 * 9 * 4, 2 * 4 * 36 * 10
    assert counted.per_sample == 2 * conv + 3 * linear
    assert plain.per_sample is None and plain.figures(5.0) == {}


def test_a_step_without_samples_is_not_the_one_that_is_counted() -> None:
    counted = Throughput(config(COUNT_FLOPS=True), object(), CPU, 1)
    with counted.step(0):
        torch.ones(2, 2) @ torch.ones(2, 2)
    with counted.step(2):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert counted.per_sample == 8


def test_the_tasks_own_word_counts() -> None:
    task = SimpleNamespace(flops=lambda: 2e9)
    told = Throughput(config(COUNT_FLOPS=True, PEAK_TFLOPS=3.0), task, CPU, 4)
    with told.step(1):
        torch.ones(2, 2) @ torch.ones(2, 2)
    figures = told.figures(3000.0)
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


def test_eta() -> None:
    eta = Eta(100, step=20, now=50.0)
    assert eta.figures(20, 51.0) == {}
    assert eta.figures(30, 70.0) == {"perf/eta_s": 140.0}
    assert eta.figures(110, 80.0) == {"perf/eta_s": 0.0}


@pytest.mark.parametrize(
    ("seconds", "read"), [(0, "0:00:00"), (60.6, "0:01:01"), (90061, "1 day, 1:01:01")]
)
def test_eta_is_read_as_a_time(seconds: float, read: str) -> None:
    record = {"step": 1, "epoch": 0, "perf/eta_s": seconds}
    assert summary(record) == f"step 1  epoch 0  eta {read}"
