"""One optimiser step: micro-batches forward and backward, gradients together, weights updated.

The update is that of one large batch at any number of ranks and micro-batches. Every micro-batch's
loss is a mean, so it counts with its own share of the global batch's weight; DDP's average over
ranks is undone by their number. With several optimisers all that happens for one after the other.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from launcher.checkpoint.state import TrainingState
from launcher.config import CfgNode
from launcher.data.splits import GlobalBatch
from launcher.edges.gradients import Clip, norm_of, nothing_of, numbers_of
from launcher.edges.model import own_buffers, switched, unused
from launcher.edges.optimizer import has_modes, update, weights_of
from launcher.edges.returned import calling, scalars
from launcher.engine.agreement import Agreement
from launcher.engine.fitting import Fitting, TooLarge
from launcher.errors import RunError
from launcher.models.parallel import exchanging
from launcher.optim.schedules import Schedule, build_schedule
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime

NOTHING = contextlib.nullcontext()
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(cfg: CfgNode, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for the forward pass; weights stay fp32 (no effect in fp32 and tf32)."""
    dtype = AUTOCAST.get(cfg.TRAIN.PRECISION)
    return torch.autocast(device.type, dtype=dtype) if dtype else NOTHING


class MicroBatch(NamedTuple):
    """What the forward pass of one micro-batch gives."""

    loss: torch.Tensor  # its part of the global batch's loss, times the number of ranks
    said: tuple[torch.Tensor, torch.Tensor] | None  # the agreement's carrier, and its gradient
    values: dict[str, torch.Tensor]  # scalars to log, the loss among them
    weight: float | torch.Tensor

    def backward(self, loss: torch.Tensor) -> None:
        """Through `loss`, in the place of its own, and the carrier."""
        if self.said is None:
            return loss.backward()
        torch.autograd.backward((loss, self.said[0]), (None, self.said[1]))


class StepModule(nn.Module):
    """The task's train_step as the forward pass of a module, so that DDP wraps all of it."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        agreement: Agreement,
        cfg: CfgNode,
        gather: Gather,
        phase: str = "",
    ) -> None:
        super().__init__()
        self.phase = (phase,) if phase else ()
        self.name = f"{type(task).__name__}.train_step" + (f" ({phase})" if phase else "")
        self.task, self.model, self.agreement, self.gather = task, model, agreement, gather
        # Counts those that were begun, where a task may begin none.
        self.collectives: Callable[[], int] = lambda: 0
        self.carrier, self.find_unused = agreement.carrier, cfg.DIST.FIND_UNUSED_PARAMETERS
        self.autocast = autocast(cfg, agreement.carrier.device)
        self.watches = cfg.DEBUG.NONFINITE != ""

    def forward(self, batch: Any, samples: int, count: int, requests: frozenset[str]) -> MicroBatch:
        """`samples` of the global batch's `count`. A rank without samples passes no batch: every
        gradient is zero then."""
        if samples == 0:
            said = self.agreement.say(requests, 0.0, False)
            assert said is not None  # there are other ranks
            # Where DDP looks for unused weights, or some were used before, only those: others have
            # no gradient then, rather than one of zeros, which decay would act on.
            used = self.find_unused or any(p.grad is not None for p in self.model.parameters())
            nothing = nothing_of(self.model, used) * 0.0
            return MicroBatch(said[0].sum() * 0.0 + nothing, said, {}, 0.0)
        begun = self.collectives()
        self.gather.begin()
        with self.autocast:
            returned = self.task.train_step(self.model, batch, *self.phase)
        if self.collectives() != begun:
            raise RunError(
                f"{self.name} begins a collective of its own, but ranks have different numbers of "
                "micro-batches in some global batch, at least in an epoch's last one: those with "
                "fewer would not take part. Use self.gather, or set TRAIN.DROP_LAST True, with "
                "TRAIN.BATCH_SIZE a multiple of the number of ranks or TRAIN.MICRO_BATCH_SIZE 0."
            )
        values = scalars(returned, self.agreement.carrier.device, self.name)
        weighted = "weight" in values
        weight = values.pop("weight").detach().float() if weighted else float(samples)
        loss = values["loss"] if values["loss"].dtype == torch.float64 else values["loss"].float()
        share = weight * (self.agreement.world_size / count)
        if weighted or share != 1.0:
            loss = loss * share
        watched = values["loss"] if self.watches else None
        said = self.agreement.say(requests, weight, weighted, watched)
        return MicroBatch(self.gather.tie(loss) if said else loss, said, values, weight)


class Phase:
    """One optimiser's part of a step, with the weights that it trains; the only one is "".

    While it runs, the gradients of all other weights are switched off, and neither computed nor
    exchanged: DDP holds its weights alone, and waits for no others.
    """

    def __init__(
        self,
        name: str,
        cfg: CfgNode,
        task: Any,
        state: TrainingState,
        runtime: Runtime,
        gather: Gather,
        schedule: Schedule,
        pending: deque[Any],
    ) -> None:
        self.name, self.schedule = name, schedule
        self.optimizer, self.scaler = state.optimizers[name], state.scalers[name]
        self.model, self.weights = state.model, list(state.model.parameters())
        own = {id(p) for p in weights_of(self.optimizer)}
        self.trains = [p.requires_grad and (not name or id(p) in own) for p in self.weights]
        self.parameters = [p for p, on in zip(self.weights, self.trains, strict=True) if on]
        shards, number = state.shards, [*state.optimizers].index(name)
        ddp = runtime.distributed and not shards
        averages = runtime.world_size if ddp else 1
        self.agreement = Agreement(runtime.device, averages, pending, alone=not ddp)
        self.module: nn.Module = StepModule(task, self.model, self.agreement, cfg, gather, name)
        if (state.data.train_plan.uneven or cfg.TRAIN.MICRO_BATCH_SIZE == "auto") and not shards:
            self.module.collectives = lambda: runtime.collectives() - gather.begun
        self.sums = shards.sums(self.parameters, self.agreement.carrier, number) if shards else None
        if ddp:
            ignored = [f"model.{name}" for name in own_buffers(self.model, state.alike)]
            with self:
                self.module = exchanging(self.module, cfg, ignored, self.agreement.carrier)
                if not cfg.DIST.FIND_UNUSED_PARAMETERS:  # which keeps the layout
                    # After its first backward pass DDP lays its buckets out anew, by which it sums:
                    # one of zeros, so that each attempt's first step has the final layout.
                    out = self.module(None, 0, 1, frozenset())
                    out.backward(out.loss)
                    self.module.zero_grad()
        # Without what torch does around a module's hooks, of which there are none.
        self.forward: Callable[..., MicroBatch] = self.module if ddp else self.module.forward
        self.held_back: Any = self.module.no_sync if ddp else contextlib.nullcontext

    def __enter__(self) -> None:
        """Only this phase's weights have gradients. Raises RunError where that was changed."""
        if self.name:
            self.before = [p.requires_grad for p in self.weights]
            self._switch(self.trains)

    def __exit__(self, error: object, *rest: object) -> None:
        if error is None and [p.requires_grad for p in self.weights] != self.trains:
            raise switched(self.model, self.trains)
        if error is None and self.name:
            self._switch(self.before)

    def _switch(self, on: list[bool]) -> None:
        for p, trains in zip(self.weights, on, strict=True):
            p.requires_grad = trains

    def zero_grad(self) -> None:
        # Not the module's, which looks for its weights first.
        for p in (*self.parameters, self.agreement.carrier):
            p.grad = None


class TrainStep:
    """Runs optimiser steps. Called the same way, the same number of times, on every rank."""

    def __init__(
        self, cfg: CfgNode, task: Any, state: TrainingState, runtime: Runtime, gather: Gather
    ) -> None:
        self.cfg, self.task, self.state, self.runtime = cfg, task, state, runtime
        self.gather, self.shards = gather, state.shards
        self.recorder, self.callbacks = state.recorder, state.callbacks
        self.moving = state.ema if cfg.MODEL.EMA_DECAY > 0 else None
        self.clip, self.watches = Clip(cfg, state.model), cfg.DEBUG.NONFINITE != ""
        ddp = runtime.distributed and not self.shards  # no weight goes without a gradient
        self.may_miss = not ddp or cfg.DIST.FIND_UNUSED_PARAMETERS
        plan = state.data.train_plan
        self.schedules = {name: build_schedule(cfg, task, plan, name) for name in state.optimizers}
        self.pending: deque[Any] = deque(state.agreed)
        for optimizer in filter(has_modes, state.optimizers.values()):
            optimizer.train()
        state.freezing.thaw(state.progress)
        self.phases: list[Phase] = []
        auto = cfg.TRAIN.MICRO_BATCH_SIZE == "auto"
        self.fitting = Fitting(state, runtime, gather) if auto else None
        self._begin()

    def _begin(self) -> None:
        """Make the phases of the weights that train from here on. Collectives."""
        if self.phases:  # a thaw: DDP's buckets and hooks, which are in cycles, make room
            self.phases.clear()
            gc.collect()
        parts = self.cfg, self.task, self.state, self.runtime, self.gather
        for name, schedule in self.schedules.items():
            self.phases.append(Phase(name, *parts, schedule, self.pending))
        self.agreement = self.phases[0].agreement

    def __call__(
        self, batch: GlobalBatch, requests: frozenset[str]
    ) -> tuple[bool, frozenset[str]] | None:
        """One step over a global batch, at the rates of the schedule.

        Returns whether the gradient scaler skipped the update (that of all phases), and the
        requests all ranks saw; None where the batch is to be taken `fitting.again`.
        """
        if self.fitting is None:
            return self._take(batch, requests)
        self.fitting.begin()
        try:
            return self._take(batch, requests)
        except TooLarge:
            self.phases[0].zero_grad()
            self._begin()  # DDP has seen half a step
            return None

    def _take(self, batch: GlobalBatch, requests: frozenset[str]) -> tuple[bool, frozenset[str]]:
        step, freezing = self.state.progress.step, self.state.freezing
        if freezing.left and freezing.thaw(self.state.progress):
            self._begin()
        if self.shards is not None:
            self.shards.seed(step)
        self.callbacks.call("before_step", sum(batch.sizes))
        phases, skipped, seen = self._running(step), True, frozenset[str]()
        # Each phase takes the same micro-batches.
        batches = list(batch.batches) if len(phases) > 1 else batch.batches
        for phase in phases:
            phase.schedule.apply(phase.optimizer, step)
            self.recorder.phase = phase.name
            gradients, weighted = self._backward(phase, batch, iter(batches), requests)
            self._normalise(phase, gradients, batch.count, weighted, idle=not batch.sizes)
            skipped &= self._update(phase, gradients)
            if phase is phases[0] or self.watches:
                seen |= phase.agreement.seen()
            requests = frozenset()  # which travel with the first phase
            phase.zero_grad()
        self.recorder.phase = ""
        if self.moving is not None and not skipped:
            self.moving.update_parameters(self.state.model)
        return skipped, seen

    def _running(self, step: int) -> list[Phase]:
        """The phases that this step has; all, or those that the task's `phases` names."""
        if not self.phases[0].name or not hasattr(self.task, "phases"):
            return self.phases
        who = f"{type(self.task).__name__}.phases({step})"
        with calling(who):
            returned = self.task.phases(step)
            names = [returned] if isinstance(returned, str) else list(returned)
        if not names or set(names) - self.schedules.keys():
            raise RunError(
                f"{who} returned {returned!r}; it must name at least one of the phases of "
                f"build_optimizer: {', '.join(self.schedules)}"
            )
        return [phase for phase in self.phases if phase.name in names]

    def _backward(
        self, phase: Phase, batch: GlobalBatch, batches: Iterator[Any], requests: frozenset[str]
    ) -> tuple[list[torch.Tensor], bool]:
        """Forward and backward over this rank's micro-batches: the gradients, and whether the task
        weighs its batches."""
        weighted = False
        # Every rank makes the same rounds; those that have fewer micro-batches are idle in the last
        # ones. Then a round with nobody's follows: gradients cross when no rank serves a gather.
        apart = self.fitting is not None and self.runtime.distributed
        rounds = batch.rounds + (batch.full < batch.rounds or apart)
        sizes = batch.sizes + [0] * (rounds - len(batch.sizes))
        walk: Iterator[tuple[int, int]] = enumerate(sizes)
        if self.fitting is not None:
            walk = self.fitting.rounds(sizes)
        elif phase.sums is not None:
            walk = phase.sums.rounds(batch.count, self.state.progress.step)
            if not batch.sizes:
                phase.agreement.say(requests, 0.0, False)
                phase.scaler.scale(torch.zeros((), device=self.runtime.device))  # its first, maybe
        with phase:
            for i, samples in walk:
                micro_batch = next(batches) if samples else None
                # Gradients cross the ranks once a step: in the last round.
                with phase.held_back() if i < rounds - 1 else NOTHING:
                    try:
                        out = phase.forward(micro_batch, samples, batch.count, requests)
                        loss = phase.scaler.scale(out.loss)
                        self.callbacks.call("on_backward", loss)
                        out.backward(loss)
                    except RuntimeError as error:
                        if self.fitting is not None and isinstance(error, torch.OutOfMemoryError):
                            self.fitting.note(error)
                            continue
                        if "finished reduction in the prior iteration" in str(error):
                            raise unused(phase.model) from error  # some micro-batches use it
                        raise
                if batch.full <= i < batch.rounds and not self.fitting:
                    self.gather.end_round(not samples)  # collectives: one, and what they gather
                if samples:
                    weighted = isinstance(out.weight, torch.Tensor)
                    self.recorder.add(out.values, out.weight)
            gradients = numbers_of(phase.parameters)
            if len(gradients) < len(phase.parameters) and not self.may_miss:
                raise unused(phase.model)
        return gradients, weighted

    def _normalise(
        self, phase: Phase, gradients: list[torch.Tensor], count: int, weighted: bool, idle: bool
    ) -> None:
        """Divide the gradients by the batch's weight where it is not its number of samples."""
        phase.scaler.unscale_(phase.optimizer)
        if idle:
            # A task weighs all of its batches or none. A rank without samples cannot tell which: it
            # asks, which waits for the device, in the rare steps with fewer samples than ranks.
            weighted = phase.agreement.any_weighted()
        if weighted:
            total = phase.agreement.total_weight
            # A global batch of weight 0 has gradients of 0, and keeps them.
            torch._foreach_mul_(gradients, torch.where(total > 0, count / total, 0.0))

    def _update(self, phase: Phase, gradients: list[torch.Tensor]) -> bool:
        self.callbacks.call("on_gradients")
        skipped, norm, scaler = False, norm_of(gradients), phase.scaler
        if self.watches and not scaler.is_enabled():  # which meets such gradients now and then
            phase.agreement.watch(norm)
        self.clip(phase.parameters, gradients, norm)
        if scaler.is_enabled():
            # Three waits for the device, in fp16 alone: both scales, and the scaler's own decision.
            before = scaler.get_scale()
            scaler.step(phase.optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
        else:
            update(phase.optimizer)
        if not skipped and self.runtime.is_main:  # it is the same on all ranks
            self.recorder.add({"grad_norm": norm}, 1.0)
        return skipped
