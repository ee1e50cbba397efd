"""Evaluation: every sample of the split once, at any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.data.splits import Data
from launcher.engine.step import autocast
from launcher.errors import RunError
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

    def __call__(self, model: nn.Module) -> dict[str, float] | None:
        """The metrics as `val/<name>`, on every rank. None where a rank was asked to stop
        meanwhile: a long evaluation must not outlast the time that a scheduler grants."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        with torch.no_grad(), self.recorder.evaluating():
            metrics = self._evaluate(model)
        for module, mode in modes:
            module.training = mode
        if metrics is None:
            return None
        self.recorder.show_held()
        return {f"val/{name}": value for name, value in metrics.items()}

    def _evaluate(self, model: nn.Module) -> dict[str, float] | None:
        task, runtime = self.task, self.runtime
        # DDP gives every rank rank 0's buffers at the start of a step, but the last step changed
        # them by each rank's own batch. One collective a buffer, once an evaluation.
        runtime.broadcast_tensors(list(model.buffers()))
        outputs, abandoned = [], False
        for i, batch in enumerate(self.data.evaluation()):
            self.guard.enter("evaluate")
            if abandoned := self.guard.stop is not None:
                break
            # By the batch, so that what it draws is the same on any rank and at any time.
            seed_everything(self.seed, i * runtime.world_size + runtime.rank)
            with self.autocast:
                output = _checked(task, task.eval_step(model, batch))
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
            plan = self.data.val_plan
            # The inverse of data/plan.py's eval_requests: whole batches, dealt in turn.
            whole = [parts[k % len(parts)][k // len(parts)] for k in range(plan.steps_per_epoch)]
            metrics = means(note for _, noted in whole for note in noted)
            metrics |= _metrics(task, [output for output, _ in whole], plan.length)
            metrics |= means(on_host(self.recorder.take()))  # what summarize noted
        # A collective: all ranks learn the result, so that all agree on a new best.
        return runtime.broadcast(metrics)


def on_host(notes: list[Note]) -> list[tuple[str, float, float]]:
    """Names, weighted values and weights as plain numbers. Waits for the device."""
    return [(name, float(value) * float(weight), float(weight)) for name, value, weight in notes]


def _metrics(task: Any, batches: list[dict[str, torch.Tensor]], length: int) -> dict[str, float]:
    outputs = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    for key, value in outputs.items():
        if len(value) != length:
            raise RunError(
                f"{type(task).__name__}.eval_step returned {len(value)} values of {key!r} for the "
                f"{length} samples of the split: one a sample is needed"
            )
    weight = outputs.pop("weight", None)
    if weight is not None and weight.dim() != 1:
        raise RunError(
            f"{type(task).__name__}.eval_step must return a 'weight' of shape (B,), one a sample; "
            f"its shape is {('B', *weight.shape[1:])}"
        )
    metrics = {}
    for key, value in outputs.items():
        if value.dim() == 1 and (value.is_floating_point() or value.dtype == torch.bool):
            metrics[key] = _mean(value.double(), weight)
    summarize = getattr(task, "summarize", None)
    if summarize is not None:
        metrics.update({key: float(value) for key, value in summarize(outputs).items()})
    return metrics


def _mean(value: torch.Tensor, weight: torch.Tensor | None) -> float:
    if weight is None:
        return value.mean().item()
    return ((value * weight.double()).sum() / weight.double().sum()).item()


def _checked(task: Any, output: Any) -> dict[str, torch.Tensor]:
    name = f"{type(task).__name__}.eval_step"
    if not isinstance(output, dict) or not output:
        raise RunError(f"{name} must return a dict of tensors, not {type(output).__name__}")
    sizes = {
        key: tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        for key, value in output.items()
    }
    first = {shape[0] if isinstance(shape, tuple) and shape else None for shape in sizes.values()}
    if None in first or len(first) != 1:
        raise RunError(
            f"{name} must return tensors of one value a sample, shape (B, ...), for the same B; "
            f"it returned {sizes}. A loss needs reduction='none'."
        )
    return output
