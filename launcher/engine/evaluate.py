"""Evaluation: every sample of the split once, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.data.plan import Plan
from launcher.engine.step import autocast
from launcher.errors import RunError
from launcher.guard.guard import Guard
from launcher.runtime.process import Runtime
from launcher.telemetry.recorder import means
from launcher.telemetry.task_recorder import on_host


def evaluate(
    cfg: CfgNode,
    task: Any,
    model: nn.Module,
    batches: Iterable[Any],
    plan: Plan,
    runtime: Runtime,
    guard: Guard,
) -> dict[str, float] | None:
    """The metrics of a split, on every rank; `batches` are this rank's. None where a rank was asked
    to stop meanwhile: a long evaluation must not outlast the time that a scheduler grants.

    Whole batches are dealt to the ranks in turn and the values of all samples are put back into
    the data set's order before they are averaged in float64, so the metrics of any number of ranks
    are those of one process to the last bit.
    """
    with torch.no_grad(), task.recorder.evaluating():
        metrics = _evaluate(cfg, task, model, batches, plan, runtime, guard)
    if metrics is not None:
        task.recorder.show_held()
    return metrics


def _evaluate(
    cfg: CfgNode,
    task: Any,
    model: nn.Module,
    batches: Iterable[Any],
    plan: Plan,
    runtime: Runtime,
    guard: Guard,
) -> dict[str, float] | None:
    # DDP gives every rank rank 0's buffers at the start of a step, but the last step changed them
    # by each rank's own batch. One collective a buffer, once an evaluation.
    runtime.broadcast_tensors(list(model.buffers()))
    was_training = model.training
    model.eval()
    outputs, abandoned = [], False
    for batch in batches:
        guard.enter("evaluate")
        if abandoned := guard.stop is not None:
            break
        with autocast(cfg, runtime.device):
            outputs.append((_checked(task, task.eval_step(model, batch)), task.recorder.take()))
    model.train(was_training)
    # The one point where evaluation waits for the device.
    mine = [
        ({k: v.detach().cpu() for k, v in output.items()}, on_host(noted))
        for output, noted in outputs
    ]
    # A collective. Ranks with fewer batches wait here for the others.
    parts = runtime.gather(None if abandoned else mine)
    metrics = None
    if parts is not None and None not in parts:
        guard.enter("summarize")
        whole = [parts[k % len(parts)][k // len(parts)] for k in range(plan.steps_per_epoch)]
        metrics = means(note for _, noted in whole for note in noted)
        metrics |= _metrics(task, [output for output, _ in whole], plan.length)
        metrics |= means(on_host(task.recorder.take()))  # what summarize noted
    # A collective: all ranks learn the result, so that all agree on a new best.
    return runtime.broadcast(metrics)


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
