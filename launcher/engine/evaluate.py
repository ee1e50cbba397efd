"""Evaluation: every sample of the split once, at any number of ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.data.splits import Data
from launcher.edges.alone import Alone
from launcher.edges.model import fill
from launcher.edges.returned import averages, calling, joined, per_sample, summarized
from launcher.engine.step import autocast
from launcher.guard.guard import Guard
from launcher.runtime.process import Runtime, seed_everything
from launcher.telemetry.recorder import Note, Recorder, means


class Evaluation:
    """Evaluates a model on the val split, as often as it is called. Every rank calls it.

    Whole batches are dealt to the ranks in turn and the values of all samples are put back into
    the data set's order before they are averaged in float64, so the metrics of any number of ranks
    are those of one process to the last bit.
    """

    def __init__(self, cfg: CfgNode, task: Any, runtime: Runtime, guard: Guard, data: Data) -> None:
        self.task, self.runtime, self.guard, self.data = task, runtime, guard, data
        self.autocast, self.seed = autocast(cfg, runtime.device), cfg.SEED
        self.recorder: Recorder = task.recorder
        self.name = type(task).__name__

    def __call__(self, model: nn.Module) -> dict[str, float] | None:
        """The metrics as `val/<name>`, on every rank. None where a rank was asked to stop
        meanwhile: a long evaluation must not outlast the time that a scheduler grants."""
        modes = [(module, module.training) for module in model.modules()]
        buffers = [buffer.clone() for buffer in model.buffers()] if self.runtime.distributed else []
        model.eval()
        with torch.no_grad(), self.recorder.evaluating():
            # Each rank has buffers of its own by now; rank 0's are evaluated. Collectives.
            fill(model.buffers(), self.runtime.broadcast_state(list(model.buffers())))
            metrics = self._evaluate(model)
            fill(model.buffers(), buffers)
        for module, mode in modes:
            module.training = mode
        if metrics is None:
            return None
        self.recorder.show_held()
        return {f"val/{name}": value for name, value in metrics.items()}

    def _evaluate(self, model: nn.Module) -> dict[str, float] | None:
        task, runtime, plan = self.task, self.runtime, self.data.val_plan
        outputs, abandoned = [], False
        for i, batch in enumerate(self.data.evaluation()):
            self.guard.enter("evaluate")
            if abandoned := self.guard.stop is not None:
                break
            k = i * runtime.world_size + runtime.rank
            start, stop = plan.batch(k)
            # By the batch, so that what it draws is the same on any rank and at any time.
            seed_everything(self.seed, k)
            who = f"{self.name}.eval_step (samples {start} to {stop - 1})"
            with self.autocast, calling(who):
                output = per_sample(task.eval_step(model, batch), stop - start, who)
            outputs.append((output, self.recorder.take()))
        # The one point where evaluation waits for the device.
        mine = [
            ({k: v.detach().cpu() for k, v in output.items()}, on_host(noted))
            for output, noted in outputs
        ]
        # A collective. Ranks with fewer batches wait here for the others.
        parts = runtime.gather(None if abandoned else mine)
        metrics = None
        if parts is not None and None not in parts:
            self.guard.enter("summarize")
            # The inverse of data/plan.py's eval_requests: whole batches, dealt in turn.
            whole = [parts[k % len(parts)][k // len(parts)] for k in range(plan.steps_per_epoch)]
            metrics = means(note for _, noted in whole for note in noted)
            values = joined([output for output, _ in whole], f"{self.name}.eval_step")
            metrics |= averages(values, f"{self.name}.eval_step")
            if hasattr(task, "summarize"):
                who = f"{self.name}.summarize"
                with Alone(who) if runtime.distributed else nullcontext():
                    metrics |= summarized(task.summarize(values), who)
            metrics |= means(on_host(self.recorder.take()))  # what summarize noted
        # A collective: all ranks learn the result, so that all agree on a new best.
        return runtime.broadcast(metrics)


def on_host(notes: list[Note]) -> list[tuple[str, float, float]]:
    """Names, values and weights as plain numbers. Waits for the device."""
    return [(name, float(value), float(weight)) for name, value, weight in notes]
