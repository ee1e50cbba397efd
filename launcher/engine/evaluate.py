"""Evaluation: every sample of a split once, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.config.checks import recorded_as
from launcher.data.plan import Plan, dealt
from launcher.data.splits import Data
from launcher.edges.alone import Alone
from launcher.edges.batch import on_cpu
from launcher.edges.model import fill
from launcher.edges.numbers import Sums
from launcher.edges.returned import averages, calling, joined, per_sample, same_names, summarized
from launcher.engine.step import autocast
from launcher.errors import RunError
from launcher.guard.guard import Guard
from launcher.runtime.process import Runtime, seed_everything
from launcher.tasks.task import overrides
from launcher.telemetry.recorder import Note, Recorder

# The outputs of one batch, with its number.
Part = tuple[int, dict[str, Any]]


class Evaluation:
    """Evaluates a model on splits, as often as it is called. Every rank calls it.

    Whole batches are dealt to the ranks in turn. A batch's means are taken in float64, those of all
    from exact sums, and outputs are put back into the data set's order: so the metrics of any
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
        buffers = [buffer.clone() for buffer in model.buffers()]
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
        found, fold = Found(self), Fold(self) if runtime.is_main else None
        mine, done, carried = list[Part](), 0, None
        for _ in range(len(dealt(plan, 0, self.shares))):  # as many rounds on every rank
            self.guard.enter("evaluate")
            if (goes_on := self.guard.stop is None) and done < len(numbers):
                k, begins = numbers[done]
                carried = None if begins else carried
                output, carried = self._batch(model, k, plan, next(batches), carried, found)
                if self.folds or self.summarizes:
                    mine.append((k, output))
                done += 1
            if self.folds:
                if self._hand_over(fold, mine if goes_on else None) is None:
                    return None
                mine = []
        whole = done == len(numbers)
        if (ranks := self._hand_over(fold, mine if whole else None, found.state())) is None:
            return None
        metrics = merged(ranks, fold.who) | fold.metrics(plan.steps_per_epoch) if fold else None
        if show and metrics is not None:
            with self.alone("show"):
                self.task.show(model)
            metrics |= means_of(self.recorder.take())
        # A collective: all ranks learn the result, so that all agree on a new best.
        return runtime.broadcast(metrics)

    def _batch(
        self, model: nn.Module, k: int, plan: Plan, batch: Any, carried: Any, found: Found
    ) -> tuple[dict[str, Any], Any]:
        """Its outputs, without their weights, and the state that is carried on."""
        start, stop = plan.batch(k)
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
        found.take(k, list(output), averages(output, who) + self.recorder.take())
        return output, carried

    def _hand_over(
        self, fold: Fold | None, mine: list[Part] | None, found: Any = None
    ) -> list[Any] | None:
        """Give rank 0 this rank's outputs and what it has `found`; what all ranks have, or an empty
        list elsewhere. None where a rank has nothing to give, for it was asked to stop.
        Collectives: all that is handed over, and whether it is whole."""
        # The one point where evaluation waits for the device.
        ours = None if mine is None else ([(k, on_cpu(output)) for k, output in mine], found)
        with calling(f"sending what {self.name}.eval_step returned"):
            ranks = self.runtime.gather(ours)
        if whole := ranks is not None and None not in ranks:
            self.guard.enter("summarize")
            if fold is not None:
                fold.take(part for parts, _ in ranks for part in parts)
        if not self.runtime.broadcast(whole):
            return None
        return [found for _, found in ranks or ()]


class Found:
    """What a rank's batches give but their outputs: of constant size, however many they are."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.who, self.sums = f"{evaluation.name}.eval_step", Sums(evaluation.runtime.device)
        self.first: dict[str, tuple[int, int]] = {}  # where each name stood first: batch, and place
        self.names: tuple[int, list[str]] | None = None  # the first batch, and those of its outputs

    def take(self, k: int, names: list[str], notes: list[Note]) -> None:
        """Count batch `k`, whose outputs have these names."""
        begun, expected = self.names = self.names or (k, names)
        same_names(names, k, expected, begun, self.who)
        for place, (name, value, weight) in enumerate(notes):
            self.first.setdefault(name, (k, place))
            self.sums.add([name], [value], weight)

    def state(self) -> Any:
        return self.names, self.first, self.sums.state()


def merged(ranks: list[Any], who: str) -> dict[str, float]:
    """The means over what all ranks have found, in the order of one process."""
    sums, places, firsts = Sums(), dict[str, tuple[int, int]](), list[tuple[int, list[str]]]()
    for names, first, state in ranks:
        sums.merge(state)
        firsts += [names] if names else []
        for key, place in first.items():
            places[key] = min(place, places.get(key, place))
    (k, expected), *others = sorted(firsts)
    for other, names in others:
        same_names(names, other, expected, k, who)
    means = sums.means()
    return {key: means[key] for key in sorted(places, key=lambda key: places[key])}


class Fold:
    """On rank 0: what batches gave, in the data set's order, whichever come first."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation, self.who = evaluation, f"{evaluation.name}.eval_step"
        self.early: dict[int, dict[str, Any]] = {}  # outputs whose turn is later
        self.next, self.folded = 0, None
        self.outputs: list[dict[str, Any]] = []
        if evaluation.folds:
            with evaluation.alone("start"):
                self.folded = evaluation.task.start()

    def take(self, parts: Iterable[Part]) -> None:
        self.early |= dict(parts)
        while self.next in self.early:
            output, k = self.early.pop(self.next), self.next
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
        """What the task makes of all outputs, and what was noted meanwhile."""
        task, found = self.evaluation.task, dict[str, float]()
        if self.evaluation.summarizes:
            whole = self.folded if self.evaluation.folds else joined(self.outputs, self.who)
            with self.evaluation.alone("summarize", steps) as who:
                found = summarized(task.summarize(whole), who)
        return found | means_of(self.evaluation.recorder.take())


def means_of(notes: Iterable[Note]) -> dict[str, float]:
    """Of each name the mean. Waits for the device."""
    sums = Sums()
    for name, value, weight in notes:
        sums.add([name], [value], weight)
    return sums.means()
