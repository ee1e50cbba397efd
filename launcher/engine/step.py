"""One optimiser step: micro-batches forward and backward, gradients together, weights updated.

The update is that of one large batch at any number of ranks and micro-batches. Every micro-batch's
loss is a mean, so it counts with its own share of the global batch's weight; DDP's average over
ranks is undone by their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from launcher.checkpoint.state import TrainingState
from launcher.config import CfgNode
from launcher.data.splits import GlobalBatch
from launcher.edges.gradients import clip, nothing_of, numbers_of
from launcher.edges.model import own_buffers, switched, unused
from launcher.edges.optimizer import has_modes
from launcher.edges.returned import scalars
from launcher.engine.agreement import Agreement
from launcher.engine.schedule import build_schedule
from launcher.errors import RunError
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(cfg: CfgNode, device: torch.device) -> torch.autocast:
    """Mixed precision for the forward pass; weights stay fp32 (no effect in fp32 and tf32)."""
    dtype = AUTOCAST.get(cfg.TRAIN.PRECISION)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class MicroBatch(NamedTuple):
    """What the forward pass of one micro-batch gives."""

    loss: torch.Tensor  # its part of the global batch's loss, times the number of ranks
    term: torch.Tensor  # the agreement's passengers, value 0
    values: dict[str, torch.Tensor]  # scalars to log, the loss among them
    weight: float | torch.Tensor


class StepModule(nn.Module):
    """The task's train_step as the forward pass of a module, so that DDP wraps all of it."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        agreement: Agreement,
        cfg: CfgNode,
        gather: Gather,
        collectives: Callable[[], int] = lambda: 0,
    ) -> None:
        """`collectives` counts those that were begun, where a task may begin none."""
        super().__init__()
        self.name, self.collectives = f"{type(task).__name__}.train_step", collectives
        self.task, self.model, self.agreement, self.gather = task, model, agreement, gather
        self.carrier, self.find_unused = agreement.carrier, cfg.DIST.FIND_UNUSED_PARAMETERS
        self.autocast = autocast(cfg, agreement.carrier.device)

    def forward(self, batch: Any, samples: int, count: int, requests: frozenset[str]) -> MicroBatch:
        """`samples` of the global batch's `count`. A rank without samples passes no batch: every
        gradient is zero then."""
        if samples == 0:
            term = self.agreement.loss_term(requests, 0.0, False)
            # Where DDP looks for unused weights, or some were used before, only those: others have
            # no gradient then, rather than one of zeros, which decay would act on.
            used = self.find_unused or any(p.grad is not None for p in self.model.parameters())
            nothing = nothing_of(self.model, used) * 0.0
            return MicroBatch(term * 0.0 + nothing, term, {}, 0.0)
        begun = self.collectives()
        self.gather.begin()
        with self.autocast:
            returned = self.task.train_step(self.model, batch)
        if self.collectives() != begun:
            raise RunError(
                f"{self.name} begins a collective of its own, but ranks have different numbers of "
                "micro-batches in some global batch, at least in an epoch's last one: those with "
                "fewer would not take part. Use self.gather, or set TRAIN.DROP_LAST True, with "
                "TRAIN.BATCH_SIZE a multiple of the number of ranks or TRAIN.MICRO_BATCH_SIZE 0."
            )
        values = scalars(returned, self.carrier.device, self.name)
        weighted = "weight" in values
        weight = values.pop("weight").detach().float() if weighted else float(samples)
        loss = values["loss"] if values["loss"].dtype == torch.float64 else values["loss"].float()
        loss = loss * (weight * (self.agreement.world_size / count))
        term = self.gather.tie(self.agreement.loss_term(requests, weight, weighted))
        return MicroBatch(loss, term, values, weight)


class TrainStep:
    """Runs optimiser steps. Called the same way, the same number of times, on every rank."""

    def __init__(
        self, cfg: CfgNode, task: Any, state: TrainingState, runtime: Runtime, gather: Gather
    ) -> None:
        self.state, self.model, self.optimizer = state, state.model, state.optimizer
        self.scaler, self.recorder, self.callbacks = state.scaler, state.recorder, state.callbacks
        self.clip, self.records = cfg.TRAIN.GRAD_CLIP, bool(cfg.LOG.EVERY)
        self.schedule, self.gather = build_schedule(cfg, state.data.train_plan), gather
        self.agreement = Agreement(runtime.device, runtime.world_size, state.agreed)
        self.weights = list(self.model.parameters())
        self.trained = [p.requires_grad for p in self.weights]
        self.parameters = [p for p in self.weights if p.requires_grad]
        counted: list[Callable[[], int]] = []
        if state.data.train_plan.uneven:
            counted = [lambda: runtime.collectives() - gather.begun]
        if has_modes(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        self.module: nn.Module = StepModule(task, self.model, self.agreement, cfg, gather, *counted)
        # Whether a weight may go without a gradient.
        self.may_miss = cfg.DIST.FIND_UNUSED_PARAMETERS or not runtime.distributed
        if runtime.distributed:
            own = own_buffers(self.model, state.alike)
            # Else DDP would give them rank 0's values before each forward pass.
            ignored: Any = [f"model.{name}" for name in own]
            self.module._ddp_params_and_buffers_to_ignore = ignored
            find_unused = cfg.DIST.FIND_UNUSED_PARAMETERS
            self.module = DDP(
                self.module, gradient_as_bucket_view=True, find_unused_parameters=find_unused
            )
            if not find_unused:  # which keeps the layout
                self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Take DDP through one backward pass of zeros.

        DDP lays its gradient buckets out anew after its first backward pass, and the layout decides
        in which order gloo and NCCL sum. Done here, each attempt's first real step already has the
        final layout, so a resumed run sums as the uninterrupted one did.
        """
        out = self.module(None, 0, 1, frozenset())
        (out.loss + out.term).backward()
        self.module.zero_grad()

    def __call__(self, batch: GlobalBatch, requests: frozenset[str]) -> tuple[bool, frozenset[str]]:
        """One step over a global batch, at the rates of the schedule.

        Returns whether the gradient scaler skipped the update, and the requests all ranks saw.
        """
        self.schedule.apply(self.optimizer, self.state.progress.step)
        self.callbacks.call("before_step", sum(batch.sizes))
        weighted = False
        # Every rank makes the same rounds; those that have fewer micro-batches are idle in the last
        # ones. Then a round with nobody's follows: gradients cross when no rank serves a gather.
        rounds = batch.rounds + (batch.full < batch.rounds)
        sizes = batch.sizes + [0] * (rounds - len(batch.sizes))
        for i, samples in enumerate(sizes):
            micro_batch = next(batch.batches) if samples else None
            # Gradients cross the ranks once a step: in the last round.
            with self._held_back() if i < rounds - 1 else contextlib.nullcontext():
                out = self._forward(micro_batch, samples, batch.count, requests)
                loss = self.scaler.scale(out.loss) + out.term
                self.callbacks.call("on_backward", loss)
                loss.backward()
            if batch.full <= i < batch.rounds:
                self.gather.end_round(idle=not samples)  # a collective, or as many as they gather
            if samples:
                weighted = isinstance(out.weight, torch.Tensor)
                self.recorder.add(out.values, out.weight)
        if self.trained != [p.requires_grad for p in self.weights]:
            raise switched(self.model, self.trained)
        gradients = numbers_of(self.parameters)
        if len(gradients) < len(self.parameters) and not self.may_miss:
            raise unused(self.model)
        self._normalise(gradients, batch.count, weighted, idle=not batch.sizes)
        skipped = self._update(gradients)
        seen = self.agreement.seen()
        self.module.zero_grad()
        return skipped, seen

    def _forward(self, *arguments: Any) -> MicroBatch:
        try:
            return self.module(*arguments)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" in str(error):
                raise unused(self.model) from error  # some micro-batches use it
            raise

    def _held_back(self) -> contextlib.AbstractContextManager[None]:
        return self.module.no_sync() if isinstance(self.module, DDP) else contextlib.nullcontext()

    def _normalise(
        self, gradients: list[torch.Tensor], count: int, weighted: bool, idle: bool
    ) -> None:
        """Divide the gradients by the batch's weight where it is not its number of samples."""
        self.scaler.unscale_(self.optimizer)
        if idle:
            # A task weighs all of its batches or none. A rank without samples cannot tell which: it
            # asks, which waits for the device, in the rare steps with fewer samples than ranks.
            weighted = self.agreement.any_weighted()
        if weighted:
            total = self.agreement.total_weight
            # A global batch of weight 0 has gradients of 0, and keeps them.
            torch._foreach_mul_(gradients, torch.where(total > 0, count / total, 0.0))

    def _update(self, gradients: list[torch.Tensor]) -> bool:
        self.callbacks.call("on_gradients")
        skipped, noted = False, {}
        if self.clip > 0 or self.records:
            noted["grad_norm"] = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.clip > 0:
            clip(gradients, noted["grad_norm"], self.clip)
        if self.scaler.is_enabled():
            # Three waits for the device, in fp16 alone: both scales, and the scaler's own decision.
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
        else:
            self.optimizer.step()
        if not skipped:
            # The same on all ranks, once a step.
            if self.records:
                self.recorder.add(noted, 1.0)
            if self.state.ema is not None:
                self.state.ema.update_parameters(self.model)
        return skipped
