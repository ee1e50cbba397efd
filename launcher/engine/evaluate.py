"""Evaluation: every sample of a split once, at any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.config.checks import recorded_as
from launcher.data.plan import dealt
from launcher.data.splits import Data
from launcher.edges.alone import Alone
from launcher.edges.batch import on_cpu
from launcher.edges.model import fill
from launcher.edges.returned import averages, calling, joined, per_sample, same_names, summarized
from launcher.engine.step import autocast
from launcher.errors import RunError
from launcher.guard.guard import Guard
from launcher.runtime.process import Runtime, seed_everything
from launcher.tasks.task import overrides
from launcher.telemetry.recorder import Note, Recorder, means

# Of one batch: its number, what it notes (its means among it), and its outputs, if they are wanted.
Part = tuple[int, list[Note], list[str], dict[str, Any]]


class Evaluation:
    """Evaluates a model on splits, as often as it is called. Every rank calls it.

    Whole batches are dealt to the ranks in turn. Means are taken in float64, of each batch and then
    of all in the data set's order, and outputs are put back into that order: so the metrics of any
    number of ranks are those of one process to the last bit.
    """

    def __init__(self, cfg: CfgNode, task: Any, runtime: Runtime, guard: Guard, data: Data) -> None:
        self.task, self.runtime, self.guard, self.data = task, runtime, guard, data
        self.autocast, self.seed = autocast(cfg, runtime.device), cfg.SEED
        self.recorder: Recorder = task.recorder
        self.name = type(task).__name__
        self.shares = getattr(task, "eval_shares", 0)
        self.folds = hasattr(task, "merge")  # batch by batch, instead of keeping all outputs
        self.summarizes = overrides(task, "summarize")

    def __call__(
        self, model: nn.Module, splits: Iterable[str], suffix: str = "", show: bool = False
    ) -> dict[str, float] | None:
        """The metrics as `<split><suffix>/<name>`, on every rank, and what the task shows. None
        where a rank was asked to stop meanwhile: a long evaluation must not outlast the time that
        a scheduler grants."""
        metrics: dict[str, float] = {}
        self.recorder.held.clear()  # of one that was given up
        with self._resting(model):
            for split in splits:
                name = f"{recorded_as(split)}{suffix}"
                with self.recorder.evaluating(name):
                    found = self._evaluate(model, split, show and hasattr(self.task, "show"))
                if found is None:
                    return None
                metrics |= {f"{name}/{key}": value for key, value in found.items()}
                show = False  # once an evaluation, under its first split
        self.recorder.show_held()
        return metrics

    @contextmanager
    def _resting(self, model: nn.Module) -> Iterator[None]:
        """The model in eval mode without gradients, with rank 0's buffers; then as it was."""
        modes = [(module, module.training) for module in model.modules()]
        buffers = [buffer.clone() for buffer in model.buffers()] if self.runtime.distributed else []
        model.eval()
        with torch.no_grad():
            # Each rank has buffers of its own by now; rank 0's are evaluated. Collectives.
            fill(model.buffers(), self.runtime.broadcast_state(list(model.buffers())))
            yield
            fill(model.buffers(), buffers)
        for module, mode in modes:
            module.training = mode

    @contextmanager
    def alone(self, method: str, number: int = 0) -> Iterator[str]:
        """Around what rank 0 calls while the others wait; what that draws is seeded."""
        seed_everything(self.seed, number)
        who = f"{self.name}.{method}"
        with calling(who), Alone(who) if self.runtime.distributed else nullcontext():
            yield who

    def _evaluate(self, model: nn.Module, split: str, show: bool) -> dict[str, float] | None:
        """The metrics of a split, by their names. Collectives."""
        runtime, plan = self.runtime, self.data.eval_plan(split)
        numbers = dealt(plan, runtime.rank, self.shares)
        batches = self.data.evaluation(split, [k for k, _ in numbers])
        fold = Fold(self) if runtime.is_main else None
        mine, done, carried = list[Part](), 0, None
        for _ in range(len(dealt(plan, 0, self.shares))):  # as many rounds on every rank
            self.guard.enter("evaluate")
            if (goes_on := self.guard.stop is None) and done < len(numbers):
                k, begins = numbers[done]
                carried = None if begins else carried
                part, carried = self._batch(model, k, plan.batch(k), next(batches), carried)
                mine.append(part)
                done += 1
            if self.folds:
                if not self._take(fold, mine if goes_on else None):
                    return None
                mine = []
        if not self.folds and not self._take(fold, mine if done == len(numbers) else None):
            return None
        metrics = fold.metrics(plan.steps_per_epoch) if fold is not None else None
        if show and metrics is not None:
            with self.alone("show"):
                self.task.show(model)
            metrics |= means(on_host(self.recorder.take()))
        # A collective: all ranks learn the result, so that all agree on a new best.
        return runtime.broadcast(metrics)

    def _batch(
        self, model: nn.Module, k: int, positions: tuple[int, int], batch: Any, carried: Any
    ) -> tuple[Part, Any]:
        start, stop = positions
        # By the batch, so that what it draws is the same on any rank and at any time.
        seed_everything(self.seed, k)
        who = f"{self.name}.eval_step (samples {start} to {stop - 1})"
        with self.autocast, calling(who):
            more = [carried] if self.shares else []
            output = self.task.eval_step(model, batch, *more)
            if self.shares:
                output = dict(output)
                carried = output.pop("carried", None)
            output = per_sample(output, stop - start, who)
        names, notes = list(output), averages(output, who) + self.recorder.take()
        return (k, notes, names, output if self.folds or self.summarizes else {}), carried

    def _take(self, fold: Fold | None, mine: list[Part] | None) -> bool:
        """Hand this rank's parts to rank 0; whether the evaluation goes on. Collectives: all that
        is handed over, and whether any rank was asked to stop."""
        # The one point where evaluation waits for the device.
        ours = mine and [(k, on_host(n), names, on_cpu(o)) for k, n, names, o in mine]
        with calling(f"sending what {self.name}.eval_step returned"):
            parts = self.runtime.gather(ours)
        if complete := fold is not None and parts is not None and None not in parts:
            self.guard.enter("summarize")
            fold.take(part for parts_of_rank in parts for part in parts_of_rank)
        return self.runtime.broadcast(complete)


class Fold:
    """On rank 0: what batches gave, in the data set's order, whichever come first."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation, self.who = evaluation, f"{evaluation.name}.eval_step"
        self.early: dict[int, Part] = {}  # parts whose turn is later
        self.next, self.names = 0, list[str]()
        self.notes: list[Note] = []
        self.outputs: list[dict[str, Any]] = []
        self.folded: Any = None
        if evaluation.folds:
            with evaluation.alone("start"):
                self.folded = evaluation.task.start()

    def take(self, parts: Iterable[Part]) -> None:
        self.early |= {part[0]: part for part in parts}
        while self.next in self.early:
            k, notes, names, output = self.early.pop(self.next)
            self.names = self.names or names
            same_names(names, self.names, k, self.who)
            self.notes += notes
            self.next += 1
            if not self.evaluation.folds:
                self.outputs.append(output)
                continue
            with self.evaluation.alone("merge", k) as who:
                self.folded = self.evaluation.task.merge(self.folded, output)
            if self.folded is None:
                raise RunError(
                    f"{who} returned None; it must return what is folded so far, for the next call"
                )

    def metrics(self, steps: int) -> dict[str, float]:
        """The means, and what the task makes of all outputs."""
        task, recorder = self.evaluation.task, self.evaluation.recorder
        found = dict.fromkeys((name for name, _, _ in self.notes), math.nan) | means(self.notes)
        if self.evaluation.summarizes:
            whole = self.folded if self.evaluation.folds else joined(self.outputs, self.who)
            with self.evaluation.alone("summarize", steps) as who:
                found |= summarized(task.summarize(whole), who)
        return found | means(on_host(recorder.take()))  # what these noted


def on_host(notes: list[Note]) -> list[tuple[str, float, float]]:
    """Names, values and weights as plain numbers. Waits for the device."""
    return [(name, float(value), float(weight)) for name, value, weight in notes]
