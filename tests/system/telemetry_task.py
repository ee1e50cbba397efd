"""A task that records everything there is, and whose files misbehave as the environment says.

LAUNCHER_TEST_STUCK  the records' files can be written only after this training step
LAUNCHER_TEST_FAIL   NAME:COUNT, so many writes to files whose path holds NAME fail, half written
LAUNCHER_TEST_SLOW   NAME:SECONDS, so much longer takes a write to files whose path holds NAME
LAUNCHER_TEST_WARN   train_step and collate (in workers) warn, and log an error, on all ranks
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import warnings
from typing import Any

import torch
from torch import nn

from launcher.telemetry import sinks
from tests.system.exact_task import Exact

STUCK = int(os.environ.get("LAUNCHER_TEST_STUCK", "0"))
NAME, _, COUNT = os.environ.get("LAUNCHER_TEST_FAIL", "").partition(":")
SLOW, _, SECONDS = os.environ.get("LAUNCHER_TEST_SLOW", "").partition(":")
WARN = bool(os.environ.get("LAUNCHER_TEST_WARN"))
logger = logging.getLogger(__name__)
reached, failures = threading.Event(), [int(COUNT or 0)]
_write = sinks.AppendFile._write


def misbehave(self: sinks.AppendFile, file: Any, data: bytes) -> None:
    recording = any(name in str(self.path) for name in ("metrics.jsonl", "tfevents"))
    if STUCK and recording and not reached.wait(60):
        raise AssertionError("the training waited for the file")
    if SLOW and SLOW in str(self.path):
        time.sleep(float(SECONDS))
    if NAME and NAME in str(self.path) and failures[0]:
        failures[0] -= 1
        _write(self, file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
    _write(self, file, data)


sinks.AppendFile._write = misbehave  # type: ignore[method-assign]


def speak(who: str) -> None:
    warnings.warn(f"warning of {who}", stacklevel=1)
    logger.error("error of %s", who)


class Telling(Exact):
    """Two parameter groups, and something of every kind at a pace of its own."""

    def collate(self, samples: list[Any]) -> Any:
        if WARN:
            speak("a worker")
        return torch.utils.data.default_collate(samples)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.calls, self.model = 0, model
        *rest, last = model.parameters()
        groups = [{"params": rest, "lr": 0.05}, {"params": [last], "lr": 0.5, "name": "head"}]
        return torch.optim.SGD(groups, momentum=0.9)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        values, step = super().train_step(model, batch), self.recorder.step
        self.calls += 1
        if self.calls >= STUCK:
            reached.set()
        if WARN:
            speak("a rank")
        if step % 2:
            self.recorder.scalar("odd_steps", step, weight=len(batch[0]))
        if step % 5 == 0:
            self.recorder.histogram("inputs", batch[0])
            self.recorder.image("inputs_as_image", batch[0].abs().clamp(max=1))
        if step % 7 == 0:
            self.recorder.text("note", f"step {step}")
        return values

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        values = super().eval_step(model, batch)
        self.recorder.scalar("mean_input", batch[0].mean(), weight=len(batch[0]))
        return {**values, "x": batch[0]}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        self.recorder.image("split", outputs["x"].abs().clamp(max=1))
        self.recorder.scalar("largest", outputs["x"].max())
        return {"mean_input_by_hand": float(outputs["x"].double().mean())}
