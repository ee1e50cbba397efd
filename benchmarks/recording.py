"""What recording costs: adding values in a step, and records while the files are slow.

    python benchmarks/recording.py [--quick] [--json]

Ratios within one run are what to compare. Each case is measured in turn, several times over, and
the median of its step times counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from launcher.telemetry import append
from launcher.telemetry.background import Background
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.sinks import JsonLines
from launcher.telemetry.tensorboard import TensorBoard

RUNTIME = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
EXTRA = {f"perf/figure_{i}": float(i) for i in range(10)}
SLOW_S = 0.05
_write = append.AppendFile._write


def slow_write(self: append.AppendFile, file: Any, data: bytes) -> None:
    time.sleep(SLOW_S)
    _write(self, file, data)


class Training:
    """A training step of a few milliseconds on one thread."""

    def __init__(self, width: int = 512) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.x = torch.randn(256, width)

    def step(self) -> dict[str, torch.Tensor]:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "accuracy": loss.detach() * 2}


def sinks(folder: Path) -> list[Any]:
    return [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard", 1)]


def bare(steps: int, folder: Path) -> float:
    training = Training()
    began = time.perf_counter()
    for _ in range(steps):
        training.step()
    return (time.perf_counter() - began) / steps


def added(steps: int, folder: Path) -> float:
    training, recorder = Training(), Recorder(RUNTIME)
    began = time.perf_counter()
    for _ in range(steps):
        recorder.add(training.step(), 64)
    return (time.perf_counter() - began) / steps


def recorded(slow: bool, threaded: bool) -> Callable[[int, Path], float]:
    """A record every step, the worst case, into metrics.jsonl and TensorBoard."""

    def measure(steps: int, folder: Path) -> float:
        training, recorder = Training(), Recorder(RUNTIME, sinks(folder))
        if threaded:
            recorder.sinks = [Background(recorder.sinks, lambda *_, **__: True)]
        append.AppendFile._write = slow_write if slow else _write  # type: ignore[method-assign]
        began = time.perf_counter()
        for step in range(1, steps + 1):
            recorder.add(training.step(), 64)
            recorder.record({"step": step, "epoch": 0, "samples": 0}, EXTRA)
            if not threaded:
                recorder.flush()
        seconds = (time.perf_counter() - began) / steps
        recorder.close()
        append.AppendFile._write = _write  # type: ignore[method-assign]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == steps, f"{len(lines)} records of {steps}"
        return seconds

    return measure


def summary_writer(steps: int, folder: Path) -> float:
    """torch's writer fed in the loop, as most scripts do: the values leave the device each step."""
    training, writer = Training(), SummaryWriter(str(folder))
    began = time.perf_counter()
    for step in range(steps):
        values = {f"train/{k}": v.item() for k, v in training.step().items()}
        for key, value in {**values, **EXTRA}.items():
            writer.add_scalar(key, value, step)
    seconds = (time.perf_counter() - began) / steps
    writer.close()
    return seconds


CASES: dict[str, Callable[[int, Path], float]] = {
    "bare loop": bare,
    "Recorder.add each step": added,
    "a record each step": recorded(slow=False, threaded=True),
    "a record each step, files 50 ms slow": recorded(slow=True, threaded=True),
    "the same without the thread": recorded(slow=True, threaded=False),
    "torch's SummaryWriter each step": summary_writer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (60, 3) if options.quick else (200, 9)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, measure in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(measure(steps, Path(folder)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    if options.json:
        print(json.dumps(medians))
        return
    print("| | step | beside the bare loop |\n| --- | --- | --- |")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.2f} ms | {seconds / medians['bare loop']:.2f} x |")


if __name__ == "__main__":
    main()
