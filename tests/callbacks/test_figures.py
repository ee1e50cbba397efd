"""What callbacks add to a record: whose part of a step is long, this process and its children, and
FLOPs counted without a trace."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from launcher.callbacks.stragglers import NAMED, Stragglers
from launcher.callbacks.system import GIB, SystemFigures
from launcher.callbacks.throughput import Throughput, known_peak, peak
from launcher.runtime.topology import Topology
from tests.callbacks.helpers import CPU, view


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_own_time_ends_with_the_last_backward_pass(micro_batches: int) -> None:
    own = Stragglers(view())
    for _ in range(2):
        own.before_step(1)
        for _ in range(micro_batches):
            time.sleep(0.01)
            loss = (torch.ones(3, requires_grad=True) * 2).sum()
            own.on_backward(loss)
            loss.backward()
        time.sleep(0.2)  # as the waiting for other ranks: not in it
        own.on_gradients()
    assert 0.01 * micro_batches <= own.local_figures()["own_s"] < 0.2
    assert own.local_figures() == {"own_s": 0.0}


def test_the_slowest_rank_is_told_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stragglers, ranks = Stragglers(view()), [{"own_s": own} for own in (0.1, 0.12, 0.3, 0.11)]
    for _ in range(2):
        figures = stragglers.figures({}, ranks)
        assert figures == {"perf/slowest_rank": 2, "perf/rank_spread_s": pytest.approx(0.2)}
    told = "own seconds a step by rank, slowest first: 2: 0.3, 1: 0.12, 3: 0.11, 0: 0.1"
    assert caplog.messages.count(told) == 2
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "rank 2 holds the others up" in warning


def test_many_ranks_take_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Stragglers(view()).figures({}, [{"own_s": 0.1}] * 500)
    (line,) = caplog.messages
    assert line.count(":") == NAMED + 1 and line.endswith(f"and {500 - NAMED} faster ones")


# A child that holds 200 MiB, computes, and waits for its end.
CHILD = """
import sys
kept = bytearray(200 << 20)
sum(range(3 * 10**7))
print("done", flush=True)
sys.stdin.read()
"""


def test_a_childs_memory_and_time_are_told_apart() -> None:
    figures = SystemFigures(view())
    before = figures.late_figures()
    other = before["system/workers_rss_gib"]  # children that other tests have left
    assert before["system/rss_gib"] > max(0.01, other)
    assert before["system/cpu_percent"] > 0  # since this process began
    command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None and child.stdout.readline() == b"done\n"
        figures.next = 0.0
        after = figures.late_figures()
    assert after["system/workers_rss_gib"] > other + 200 / 1024
    assert after["system/rss_gib"] > after["system/workers_rss_gib"]
    assert after["system/workers_cpu_percent"] > 0
    assert after["system/cpu_percent"] >= after["system/workers_cpu_percent"]


def test_they_are_read_anew_only_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = SystemFigures(view())
    reads = []

    def slow(now: float) -> dict[str, float]:
        reads.append(now)
        clock[0] += 0.5  # what a read takes, on a machine of many processes
        return {"system/x": float(len(reads))}

    clock = [1000.0]
    monkeypatch.setattr(figures, "_read", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert figures.late_figures() == {"system/x": 1.0}
    clock[0] += 49
    assert figures.late_figures() == {"system/x": 1.0}  # a hundredth of the time, no more
    clock[0] += 2
    assert figures.late_figures() == {"system/x": 2.0}


def test_the_disk_that_the_run_is_on(tmp_path: Path) -> None:
    here, gone = (SystemFigures(view(directory=path)) for path in (tmp_path, tmp_path / "gone"))
    assert 0 < here.late_figures()["system/disk_free_gib"] < (1 << 60) / GIB
    assert "system/disk_free_gib" not in gone.late_figures()


def test_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where torch has no library to ask for the utilisation, it is told once and left out."""
    gpu, asked = torch.device("cuda", 0), Mock(side_effect=ModuleNotFoundError("no nvidia-ml-py"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "utilization", asked)
    figures = SystemFigures(view(device=gpu))
    caplog.set_level(logging.INFO, "launcher")
    for _ in range(2):
        figures.next = 0.0
        found = figures.late_figures()
        assert (found["system/gpu_mem_gib"], found["system/gpu_mem_reserved_gib"]) == (3, 4)
        assert "system/gpu_percent" not in found
    asked.assert_called_once_with(gpu)
    assert caplog.text.count("launcher[gpu]") == 1
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 55)
    assert SystemFigures(view(device=gpu)).late_figures()["system/gpu_percent"] == 55


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
        throughput.on_step()
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
        throughput.on_step()
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
