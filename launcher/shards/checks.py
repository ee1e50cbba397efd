"""What TRAIN.SHARDS cannot hold for is refused, with the reason and what to do instead."""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.edges.gradients import sparse_weights
from launcher.edges.model import bits, fits, some
from launcher.edges.state import alike, state_of
from launcher.errors import RunError, UsageError
from launcher.log import get_logger
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime

logger = get_logger(__name__)
COMPILATIONS = 64
SPARSE = "have sparse gradients, which are not summed by shards: sparse=False, or TRAIN.SHARDS 0"
NO_GATHER = (
    "with TRAIN.SHARDS each shard goes through the model by itself, on whichever rank. Compute the "
    "loss from the shard's own samples, or set TRAIN.SHARDS 0."
)


def check_shards(cfg: CfgNode, state: Any, runtime: Runtime, gather: Gather) -> None:
    """Raise UsageError for what would give other bits on another number of ranks; `state` is the
    run's, fresh."""
    gather.refused = f"Task.gather: {NO_GATHER}"
    shards, model = cfg.TRAIN.SHARDS, state.model
    if shards % runtime.world_size:
        fit = [n for n in range(1, shards + 1) if shards % n == 0]
        raise UsageError(
            f"TRAIN.SHARDS {shards} is not divisible by {runtime.world_size} ranks: start "
            f"{', '.join(map(str, fit))} of them. Another number of shards gives other bits."
        )
    if norms := [*_norms(model, state.freezing)]:
        raise UsageError(
            f"TRAIN.SHARDS: {some(norms)} normalise by the samples that go through the model at "
            "once, and keep statistics that follow from their order on a rank. Take GroupNorm or "
            "LayerNorm, or put them into eval mode in build_model and never MODEL.THAW them, or "
            "set TRAIN.SHARDS 0."
        )
    sparse = sparse_weights(model)
    if names := [name for name, p in model.named_parameters() if id(p) in sparse]:
        raise UsageError(f"TRAIN.SHARDS: {some(names)} {SPARSE}")
    if runtime.device.type == "cuda" and not cfg.DETERMINISTIC:
        logger.warning("TRAIN.SHARDS gives the same bits on CUDA with DETERMINISTIC True alone")


def _norms(model: nn.Module, freezing: Any) -> Iterator[str]:
    """The norms that keep statistics of batches, now or once they are thawed."""
    later = [(pattern, {id(p) for p in found}) for _, pattern, found in freezing.left]
    for name, norm in model.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._NormBase):
            continue
        own = {id(p) for p in norm.parameters(recurse=False)}
        thaws = any(own & ids if own else fits(name, pattern) for pattern, ids in later)
        keeps = isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.track_running_stats
        if keeps and (norm.training or (thaws and name in freezing.norms)):
            yield name


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


def check_alike(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where ranks have states of their own, as a checkpoint holds them."""
    for number, rank in enumerate(ranks):
        what = ["the model's buffers"] if rank["buffers"] else []
        what += [] if alike(rank["task"], ranks[0]["task"]) else ["the task's own state"]
        if what:
            raise RunError(
                f"TRAIN.SHARDS: {' and '.join(what)} differ between rank {number} and rank 0: they "
                "follow from the shards that a rank has. Change them in on_step, from what is the "
                "same on all ranks, or set TRAIN.SHARDS 0."
            )


class Watch:
    """Over what the forward and backward passes of a phase's step may not do, for it would follow
    from the shards that a rank has: change the model's weights or buffers or the task's state, or
    begin collectives. The first step is looked at closely: numbers, and the task's state."""

    def __init__(self, model: nn.Module, task: Any, runtime: Runtime) -> None:
        self.model, self.task, self.runtime = model, task, runtime
        self.name, self.first = f"{type(task).__name__}.train_step", True

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Around them. Raises RunError."""
        before, closely = self._versions(), self._numbers() if self.first else None
        yield
        now, changed = self._versions(), dict[str, None]()
        changed.update(
            {name: None for name in {**before, **now} if now.get(name) != before.get(name)}
        )
        if closely is not None:
            bits_now, state = self._numbers()
            changed.update({name: None for name in bits_now if bits_now[name] != closely[0][name]})
            if not alike(state, closely[1]):
                changed["the task's own state"] = None
        self.first = False
        if changed:
            raise RunError(
                f"TRAIN.SHARDS: {self.name} changes {some([*changed])}: that would follow from the "
                "shards that a rank has. Change it in on_step, from what is the same on all ranks, "
                "or set TRAIN.SHARDS 0."
            )

    def collectives(self) -> int:
        """Those on the default group so far."""
        return self.runtime.collectives() - self.runtime.beside.begun

    def check_collectives(self, before: int) -> None:
        """Raise RunError where one was begun."""
        if self.collectives() != before:
            raise RunError(f"{self.name} begins a collective of its own, but {NO_GATHER}")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return dict([*self.model.named_parameters(), *self.model.named_buffers()])

    def _versions(self) -> dict[str, tuple[int, int]]:
        found = self._tensors().items()
        return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in found}

    def _numbers(self) -> tuple[dict[str, int], Any]:
        """Waits for the device."""
        return bits(self._tensors()), copy.deepcopy(state_of(self.task))


@contextlib.contextmanager
def many_compilations() -> Iterator[None]:
    """One for each shape. By default torch gives up after eight, and runs what comes then as it is:
    other shapes on another number of ranks."""
    import torch._dynamo.config as dynamo

    before = dynamo.fail_on_recompile_limit_hit, dynamo.recompile_limit
    dynamo.fail_on_recompile_limit_hit = True
    dynamo.recompile_limit = max(COMPILATIONS, before[1])
    try:
        yield
    finally:
        dynamo.fail_on_recompile_limit_hit, dynamo.recompile_limit = before
