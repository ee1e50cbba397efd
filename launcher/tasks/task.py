"""What users write: a model, data sets and two steps. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.tasks.recorder import Recorder
from launcher.tasks.run import Run

if TYPE_CHECKING:
    import torch
    from torch import nn


class Task:
    """A model and its data. The launcher moves batches to the device, wraps the model, seeds,
    shards, logs and saves; a task never asks for its rank.

    `self.recorder` takes scalars, images, histograms, texts and figures beside what the steps
    return, at any pace: see Recorder. `self.run` is what it may know of its run: see Run.
    """

    recorder: Recorder = Recorder()
    run: Run = Run()
    # Names of the model's buffers (or patterns, as "*.queue") of which all ranks go by rank 0's, as
    # they do of batch-norm's statistics. Any other buffer is its rank's own.
    shared_buffers: Sequence[str] = ()

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    @classmethod
    def defaults(cls) -> CfgNode:
        """The task's own keys and their defaults; they become TASK.*."""
        return CfgNode()

    @classmethod
    def metrics(cls) -> list[str] | None:
        """The names that `eval_step` and `summarize` return, so that CHECKPOINT.METRIC is checked
        before the start; None: not told, so checked at the first evaluation."""
        return None

    def build_model(self) -> nn.Module:
        """The model, on the CPU; the launcher moves it."""
        raise NotImplementedError

    def build_dataset(self, split: str) -> Any:
        """The data set of "train" or "val": `len()` and `[index]` for each sample."""
        raise NotImplementedError

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """{"loss": scalar mean over the batch, ...other scalars to log}.

        An optional "weight" (a scalar, say the number of tokens) takes the place of the number of
        samples when gradients and means are put together over micro-batches and ranks.
        """
        raise NotImplementedError

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """{"loss": one value a sample, shape (B,), ...}, optionally "weight", shape (B,).

        Floating-point and boolean values of shape (B,) are averaged over the split. Anything else
        of shape (B, ...) is only handed to `summarize`.
        """
        raise NotImplementedError

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics that are not a mean, from all outputs of `eval_step` over the whole split.

        `outputs` holds CPU tensors of shape (N, ...) in the data set's order. Called on rank 0.
        """
        return {}

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, in rank order: (n, ...) on each rank -> (sum of all n, ...), with
        gradients. For `train_step`: the rows are those of the micro-batches that the ranks have at
        the same time, n may differ, and no rank may leave it out."""
        return tensor

    # Optional, found by name because their absence has a meaning of its own:
    #   collate(self, samples) -> batch              default: torch's default_collate
    #   build_optimizer(self, model) -> Optimizer    default: from OPTIM.*
    #   flops(self) -> float         of one sample, forward and backward; for perf/flops_per_s
    #   schedule(self, step, total) -> float    the factor of the rate for the update that follows
    #                                `step` of `total`; with several optimisers a dict, by phase
    #   state_dict(self), load_state_dict(self, state)    what else must survive, on each rank
    #   on_start, on_step, on_record, on_evaluation, on_checkpoint, on_end    as a callback's


def overrides(task: Any, method: str) -> bool:
    """Whether a task, or the class of one, has a method of its own."""
    found, base = getattr(task, method, None), getattr(Task, method, None)
    return found is not None and getattr(found, "__func__", found) is not base


def make_task(
    task_class: type,
    cfg: CfgNode,
    recorder: Recorder,
    run: Run | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """A task that has its recorder, and the `run` and `gather` of its run, before its `__init__`;
    what its class calls so itself stays."""
    plain = task_class.__new__ is object.__new__
    task = task_class.__new__(task_class, *([] if plain else [cfg]))
    task.recorder = recorder
    for name, given in (("run", run), ("gather", gather)):
        ours = getattr(Task, name)
        if given is not None and getattr(task_class, name, ours) is ours:
            setattr(task, name, given)
    task.__init__(cfg)
    return task
