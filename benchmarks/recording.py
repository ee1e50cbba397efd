"""What recording costs: adding values in a step, and records while the files are slow.

    python benchmarks/recording.py [--quick] [--json]

Ratios within one run are what to compare. The cases take turns, many times over; of a turn's steps
the mean counts, and of a case's turns the quickest: what other work on the machine adds is not its.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from launcher.callbacks.tensorboard import EventFile
from launcher.config import defaults
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.sinks import AppendFile, JsonLines, Record, Sink
from launcher.telemetry.writer import Writer

RUNTIME = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
EXTRA = {f"perf/figure_{i}": float(i) for i in range(10)}
SLOW_S = 0.05
_write = AppendFile._write


def slow_write(self: AppendFile, file: Any, data: bytes) -> None:
    time.sleep(SLOW_S)
    _write(self, file, data)


def now() -> np.ndarray:
    """The clock, and the CPU time of the thread that trains, which other work leaves alone."""
    return np.array([time.perf_counter(), time.thread_time()])


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


def sinks(folder: Path) -> list[Sink]:
    return [JsonLines(folder / "metrics.jsonl"), EventFile(folder / "tensorboard", 1, defaults())]


def bare(steps: int, folder: Path) -> np.ndarray:
    training = Training()
    began = now()
    for _ in range(steps):
        training.step()
    return (now() - began) / steps


def added(steps: int, folder: Path) -> np.ndarray:
    training, recorder = Training(), Recorder(RUNTIME, Progress(), Writer())
    began = now()
    for _ in range(steps):
        recorder.add(training.step(), 64)
    return (now() - began) / steps


class Inline(Writer):
    """The same sinks without a thread: each record is in the files before the next step."""

    def __init__(self, sinks: list[Sink]) -> None:
        super().__init__()
        self.sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write([record])

    def close(self) -> None:
        for sink in self.sinks:
            sink.close(False)


def threaded(sinks: list[Sink]) -> Writer:
    writer = Writer()
    writer.open(sinks, lambda *_, **__: True)
    return writer


def record(recorder: Recorder) -> None:
    gathered = recorder.gather()
    assert gathered is not None
    recorder.write({**gathered[0], **EXTRA})


def fails(self: AppendFile, file: Any, data: bytes) -> None:
    raise OSError(28, "No space left on device")


def recorded(
    every: int, make: Callable[[list[Sink]], Writer] = threaded, write: Any = None
) -> Callable[[int, Path], np.ndarray]:
    """A record every so many steps, into metrics.jsonl and TensorBoard; the files' own `write`."""

    def measure(steps: int, folder: Path) -> np.ndarray:
        training, writer = Training(), make(sinks(folder))
        recorder = Recorder(RUNTIME, Progress(), writer)
        AppendFile._write = write or _write  # type: ignore[method-assign]
        began = now()
        for step in range(1, steps + 1):
            recorder.add(training.step(), 64)
            if step % every == 0:
                record(recorder)
        seconds = (now() - began) / steps
        AppendFile._write = _write  # type: ignore[method-assign]
        writer.close()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == steps // every, f"{len(lines)} records of {steps // every}"
        return seconds

    return measure


def summary_writer(steps: int, folder: Path) -> np.ndarray:
    """torch's writer fed in the loop, as most scripts do: the values leave the device each step."""
    training, writer = Training(), SummaryWriter(str(folder))
    began = now()
    for step in range(steps):
        values = {f"train/{k}": v.item() for k, v in training.step().items()}
        for key, value in {**values, **EXTRA}.items():
            writer.add_scalar(key, value, step)
    seconds = (now() - began) / steps
    writer.close()
    return seconds


INLINE = "50 ms a write, without the thread"
CASES: dict[str, Callable[[int, Path], np.ndarray]] = {
    "bare loop": bare,
    "`Recorder.add` each step": added,
    "and a record every 10 steps": recorded(10),
    "and a record each step": recorded(1),
    "and its files take 50 ms a write": recorded(1, write=slow_write),
    "and its files fail": recorded(1, write=fails),
    INLINE: recorded(1, Inline, write=slow_write),
    "torch's SummaryWriter each step": summary_writer,
}


def calls(number: int = 50, repeats: int = 200) -> dict[str, float]:
    """Microseconds of one call in the training's thread: so short that the quickest of many was
    disturbed by nothing. The thread is handed what it cannot write."""
    AppendFile._write = fails  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        writer = threaded(sinks(Path(folder)))
        recorder, values = Recorder(RUNTIME, Progress(), writer), Training().step()
        functions = {
            "add": lambda: recorder.add(values, 64),
            "add and record": lambda: (recorder.add(values, 64), record(recorder)),
        }
        found = {
            name: 1e6 * min(timeit.repeat(function, number=number, repeat=repeats)) / number
            for name, function in functions.items()
        }
        AppendFile._write = _write  # type: ignore[method-assign]
        writer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (50, 4) if options.quick else (100, 10)
    times: dict[str, list[np.ndarray]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, measure in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                few = steps // 10 if name == INLINE else steps
                times[name].append(measure(few, Path(folder)))
    least = {name: np.min(values, axis=0) for name, values in times.items()}
    found = {}
    for name, (step_s, cpu_s) in least.items():
        ratio, cpu_ratio = (step_s, cpu_s) / least["bare loop"]
        found[name] = {"step_s": step_s, "ratio": ratio, "cpu_s": cpu_s, "cpu_ratio": cpu_ratio}
    micros = calls()
    if options.json:
        print(json.dumps({"cases": found, "calls_us": micros}))
        return
    print("| | step | its thread's CPU time |\n| --- | --- | --- |")
    for name, case in found.items():
        wall = f"{1000 * case['step_s']:.2f} ms, {case['ratio']:.2f} x"
        print(f"| {name} | {wall} | {1000 * case['cpu_s']:.2f} ms, {case['cpu_ratio']:.2f} x |")
    print("\nOne call takes", ", ".join(f"{us:.0f} us ({name})" for name, us in micros.items()))


if __name__ == "__main__":
    main()
