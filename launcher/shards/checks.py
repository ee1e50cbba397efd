"""What TRAIN.SHARDS cannot hold for is refused, with the reason and what to do instead."""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.edges.gradients import sparse_weights
from launcher.edges.model import some
from launcher.edges.state import alike, state_of
from launcher.errors import RunError, UsageError
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime

NO_GATHER = (
    "with TRAIN.SHARDS each shard goes through the model by itself, on whichever rank. Compute the "
    "loss from the shard's own samples, or set TRAIN.SHARDS 0."
)


def check_shards(cfg: CfgNode, model: nn.Module, runtime: Runtime, gather: Gather) -> None:
    """Raise UsageError for what would give other bits on another number of ranks."""
    gather.refused = f"Task.gather: {NO_GATHER}"
    shards = cfg.TRAIN.SHARDS
    if shards % runtime.world_size:
        fit = [n for n in range(1, shards + 1) if shards % n == 0]
        raise UsageError(
            f"TRAIN.SHARDS {shards} is not divisible by {runtime.world_size} ranks: start "
            f"{', '.join(map(str, fit))} of them. Another number of shards gives other bits."
        )
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.training
        and (isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats)
    ]
    if norms:
        raise UsageError(
            f"TRAIN.SHARDS: {some(norms)} normalise by the samples that go through the model at "
            "once, and keep statistics that follow from their order on a rank. Take GroupNorm or "
            "LayerNorm, or put them into eval mode in build_model (frozen), or set TRAIN.SHARDS 0."
        )
    sparse = sparse_weights(model)
    if names := [name for name, p in model.named_parameters() if id(p) in sparse]:
        raise UsageError(
            f"TRAIN.SHARDS: {some(names)} have sparse gradients, which are not summed in the order "
            "of shards: sparse=False, or TRAIN.SHARDS 0."
        )
    if cfg.MODEL.COMPILE:
        import torch._dynamo.config as dynamo

        # Else what comes after some recompilations runs uncompiled, from other shapes on each rank.
        dynamo.fail_on_recompile_limit_hit = True


def kind_of_machine(runtime: Runtime, threads: int) -> dict[str, Any]:
    """What the bits of a step hang on beside the config; to be the same on all ranks. Raises
    UsageError where a checkpoint has these `threads` (0: there is none), and now there are others.
    """
    now = torch.get_num_threads()
    if threads and threads != now:
        raise UsageError(
            f"TRAIN.SHARDS: the checkpoint was computed with {threads} threads a rank; with {now} "
            f"sums round otherwise. Set OMP_NUM_THREADS={threads}, or do not set it."
        )
    cuda = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return {"the kind of device": f"{platform.machine()} {device}", "the threads a rank": now}


class Watch:
    """Over what the forward passes of a step may not do, for it would follow from the shards that a
    rank has: change the model's buffers or, looked at in an attempt's first step, the task's state,
    or begin collectives."""

    def __init__(self, model: nn.Module, task: Any, runtime: Runtime) -> None:
        self.model, self.task, self.runtime = model, task, runtime
        self.looked = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Around them. Raises RunError."""
        before, begun = self._buffers(), self._collectives()
        state = None if self.looked else copy.deepcopy(state_of(self.task))
        yield
        now, name, changed = self._buffers(), f"{type(self.task).__name__}.train_step", list[str]()
        if now != before:
            names = [name for name in {**before, **now} if now.get(name) != before.get(name)]
            changed = [f"buffers of the model ({some(names)})"]
        if not self.looked and not alike(state, state_of(self.task)):
            changed.append("the task's own state")
        self.looked = True
        if changed:
            raise RunError(
                f"TRAIN.SHARDS: {name} changes {' and '.join(changed)}; that would follow from the "
                "shards that a rank has. Change it in on_step, from what is the same on all ranks, "
                "or set TRAIN.SHARDS 0."
            )
        if self._collectives() != begun:
            raise RunError(f"{name} begins a collective of its own, but {NO_GATHER}")

    def _buffers(self) -> dict[str, tuple[int, int]]:
        return {name: (id(b), b._version) for name, b in self.model.named_buffers()}

    def _collectives(self) -> int:
        """Those on the default group."""
        return self.runtime.collectives() - self.runtime.beside.begun
