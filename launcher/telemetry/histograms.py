"""Histograms of weights and gradients, by LOG.HISTOGRAMS, from rank 0: all ranks have the same."""

from __future__ import annotations

import torch
from torch import nn

from launcher.runtime.progress import Every, Progress
from launcher.telemetry.media import Media, OnHost, spread
from launcher.telemetry.recorder import Recorder


class Histograms:
    """`weights/<name>` after a step's update and `gradients/<name>` of that step, before clipping.

    The step calls `gradients` before each update; only where histograms are due does it anything.
    """

    def __init__(self, period: str, model: nn.Module, recorder: Recorder) -> None:
        self.every, self.recorder = Every(period), recorder
        self.parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.due = False
        self.found: dict[str, torch.Tensor] = {}

    def prepare(self, before: Progress, samples: int, samples_per_epoch: int) -> None:
        """Whether the step to come is due, unless the gradient scaler skips it."""
        after = before.copy()
        after.advance(samples, samples_per_epoch, False)
        self.due = self.recorder.writer.is_open and self.every.due(before, after)

    def gradients(self) -> None:
        if self.due:
            self.found = {
                f"gradients/{name}": spread(p.grad)
                for name, p in self.parameters
                if p.grad is not None and p.numel()
            }

    def show(self, step: int) -> None:
        """Hand them to the sinks, after a step that was not skipped."""
        if not self.due:
            return
        for name, p in self.parameters:
            if p.numel():
                self.found[f"weights/{name}"] = spread(p)
        # One copy to the host; it is waited for where it is written.
        stacked = OnHost(torch.stack(list(self.found.values())))
        self.recorder.show(Media("histogram", list(self.found), stacked, step))
        self.found = {}
