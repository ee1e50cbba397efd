"""Histograms of weights and gradients, by LOG.HISTOGRAMS, from rank 0: all ranks have the same."""

from __future__ import annotations

import torch

from launcher.callbacks import Run
from launcher.runtime.progress import Every
from launcher.tasks.pictures import spread
from launcher.telemetry.media import Media, OnHost


class Histograms:
    """`weights/<name>` after a step's update, `gradients/<name>` of that step before clipping."""

    def __init__(self, run: Run) -> None:
        self.run, self.every = run, Every(run.cfg.LOG.HISTOGRAMS)
        self.parameters = [
            (name, p) for name, p in run.model.named_parameters() if p.requires_grad and p.numel()
        ]
        self.due = False
        self.found: dict[str, torch.Tensor] = {}

    def before_step(self, samples: int) -> None:
        self.due = self.run.runtime.rank == 0 and self.run.is_due(self.every)
        self.found = {}

    def on_gradients(self) -> None:
        if self.due:
            self.found |= {  # with phases, one after the other
                f"gradients/{name}": spread(p.grad)
                for name, p in self.parameters
                if p.grad is not None
            }

    def on_step(self) -> None:
        if not self.due:
            return
        self.found |= {f"weights/{name}": spread(p) for name, p in self.parameters}
        # One copy to the host; it is waited for where it is written.
        stacked = OnHost(torch.stack(list(self.found.values())))
        media = Media("histogram", list(self.found), stacked, self.run.progress.step)
        self.run.recorder.writer.show(media)
