"""Optional parts of a run, one file each, over one protocol.

A callback is any object made as `Class(run, **arguments)` that has some of the methods below; it
needs no base class. A method that is not there costs nothing. These are called on every rank
alike, but for `on_saved`:

    on_start()                  before an attempt's first step
    before_step(samples)        before a step in which this rank has so many samples
    on_backward(loss)           before the backward pass of each micro-batch
    on_gradients()              before each update, with the batch's gradients, not yet clipped
    on_step()                   after an update, before anything is saved; not after a skipped one
    on_record(record)           after a record; the record on rank 0, None elsewhere
    on_evaluation(metrics)      after an evaluation, with its metrics
    on_checkpoint()             before a checkpoint is taken
    on_nonfinite(late)          a loss or gradient was not finite, with DEBUG.NONFINITE; so many
                                answers of the ranks after it are not read yet
    on_saved(seconds)           one is written; on rank 0, in the thread that did it
    on_end()                    the run is complete
    state_dict(), load_state_dict(state)    plain values and tensors, one a rank, saved with the run

A hook may return a request: "stop" (now, to be resumed), "finish" (the run is complete here),
"evaluate" or "checkpoint"; after the next step all ranks do it together. A callback that has a
`reason`, a line of text, when it asks is quoted with it: "finished by Class: reason".

A task may have on_start, on_step, on_record, on_evaluation, on_checkpoint and on_end as well. They
are called before the callbacks', but for on_end: what the callbacks leave is there for it.

Three methods give figures to the record:

    local_figures() -> dict             on every rank, right before a record; travels with it
    figures(record, ranks) -> dict      on rank 0: more values, from the record and from what
                                        local_figures gave, by rank
    late_figures() -> dict              on rank 0, in the thread that writes: what takes its time

One gives a place where records go:

    sink() -> Sink              on rank 0, once the run directory is open: records and media go to
                                it, in the thread that writes (see launcher/telemetry/sinks.py)
"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.words import arguments
from launcher.edges.returned import calling
from launcher.errors import RunError, UsageError
from launcher.runtime.progress import Every, Progress
from launcher.tasks.resolve import resolve_class

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    from launcher.config import CfgNode
    from launcher.data.splits import Data
    from launcher.runtime.process import Runtime
    from launcher.telemetry.logs import ConsoleHandler
    from launcher.telemetry.recorder import Recorder
    from launcher.telemetry.sinks import Sink

REQUESTS = ("stop", "finish", "evaluate", "checkpoint")
# Those that a task may have too; its other methods are its own, whatever they are called.
OF_TASK = ("on_start", "on_step", "on_record", "on_evaluation", "on_checkpoint", "on_end")
# The callbacks by name: what somebody has to ask for.
BUILTIN = {
    "best_weights": "launcher.callbacks.best_weights:BestWeights",
    "early_stopping": "launcher.callbacks.early_stopping:EarlyStopping",
    "plateau": "launcher.callbacks.plateau:Plateau",
}


@dataclass(frozen=True)
class Run:
    """What a callback may look at, and not change."""

    cfg: CfgNode
    task: Any
    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]  # by phase; "" where there is one
    recorder: Recorder
    data: Data
    runtime: Runtime  # device, rank, world size
    directory: Path
    average: AveragedModel | None = None  # of the weights, where MODEL asks for one
    console: ConsoleHandler | None = None  # the log's, where the launcher has set that up

    @property
    def progress(self) -> Progress:
        """Steps, epochs and samples done."""
        return self.recorder.progress

    def is_due(self, every: Every, ahead: int = 0) -> bool:
        """Whether a period ends with the step under way, or so many steps later, if none of them is
        skipped."""
        plan, after = self.data.train_plan, self.progress.copy()
        for _ in range(ahead + 1):
            before = after.copy()
            start, stop = plan.batch(plan.batches_in(after.samples) % plan.steps_per_epoch)
            after.advance(stop - start, plan.samples_per_epoch, skipped=False)
        return every.due(before, after)


class Callbacks:
    """All callbacks of a run, and its task's hooks: calls them, and keeps what they ask for until
    the ranks agree."""

    def __init__(self, callbacks: Sequence[Any] = (), task: Any = None) -> None:
        self.all, self.task = list(callbacks), task
        self.asked: dict[str, str] = {}  # request -> who asks, and why; sent with the next step
        self.reasons: dict[str, str] = {}  # of all that was asked for in this attempt
        self._methods: dict[str, list[Callable[..., Any]]] = {}
        self._hooks: dict[str, list[tuple[Any, calling, Callable[..., Any]]]] = {}

    def methods(self, name: str) -> list[Callable[..., Any]]:
        """The callbacks' methods of this name."""
        if name not in self._methods:
            self._methods[name] = [getattr(c, name) for c in self.all if hasattr(c, name)]
        return self._methods[name]

    def _hooks_of(self, name: str) -> list[tuple[Any, calling, Callable[..., Any]]]:
        """The hooks of this name in the order in which they are called, each with whose it is, and
        what an error in it is told with."""
        task = [self.task] if name in OF_TASK else []
        order = [*self.all, *task] if name == "on_end" else [*task, *self.all]
        return [
            (owner, calling(f"{type(owner).__name__}.{name}"), getattr(owner, name))
            for owner in order
            if callable(getattr(owner, name, None))
        ]

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all that have it. Raises RunError for a request that is none."""
        if hook not in self._hooks:
            self._hooks[hook] = self._hooks_of(hook)
        for owner, told_with, method in self._hooks[hook]:
            try:  # for `with` calls twice, and most hooks do next to nothing
                request = method(*arguments)
            except Exception as error:
                told_with.note(error)
                raise
            if request is None:
                continue
            if not isinstance(request, str) or request not in REQUESTS:
                raise RunError(
                    f"{told_with.who} returned {request!r}; a request is one of "
                    f"{', '.join(REQUESTS)}, or None"
                )
            name, why = type(owner).__name__, getattr(owner, "reason", "")
            told = f"{name}: {why}" if isinstance(why, str) and why else name
            self.asked.setdefault(request, told)

    def take(self) -> frozenset[str]:
        """What is asked for; it travels with the step to come."""
        taken, self.asked = self.asked, {}
        self.reasons = {**taken, **self.reasons}  # whoever asked first is why
        return frozenset(taken)

    def requests(self, agreed: Sequence[Sequence[str]]) -> dict[str, dict[str, str]]:
        """What is asked for, and why what is `agreed` and not seen yet was; to be saved. A stop is
        for this attempt alone."""
        on_their_way = {request for names in agreed for request in names}
        asked = {k: v for k, v in self.asked.items() if k != "stop"}
        why = {k: v for k, v in self.reasons.items() if k in on_their_way}
        return {"asked": asked, "reasons": why}

    def add_requests(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `requests` gave."""
        self.asked.update(saved["asked"])
        self.reasons.update(saved.get("reasons", {}))  # an earlier version saved none

    def figures(self, record: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> dict:
        found: dict[str, float] = {}
        for method in self.methods("figures"):
            found |= method({**record, **found}, ranks)
        return found

    def local_figures(self) -> dict[str, Any]:
        return self._merged("local_figures")

    def late_figures(self) -> dict[str, float]:
        return self._merged("late_figures")

    def sinks(self) -> list[Sink]:
        return [method() for method in self.methods("sink")]

    def _merged(self, name: str) -> dict[str, Any]:
        return {key: value for method in self.methods(name) for key, value in method().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: callback.state_dict() for name, callback in self._with_state()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Each callback gets what it saved; one that is new to the run starts afresh."""
        for name, callback in self._with_state():
            if name in states:
                callback.load_state_dict(states[name])

    def _with_state(self) -> list[tuple[str, Any]]:
        """Those that have a state, each with its name in a checkpoint: its class and which of that
        it is, so that others, which come and go with the config and the rank, change no name."""
        found, seen = [], Counter[str]()
        for callback in self.all:
            if hasattr(callback, "state_dict"):
                name = type(callback).__name__
                found.append((f"{seen[name]} {name}", callback))
                seen[name] += 1
        return found


Made = tuple[type, dict[str, Any]]  # a callback's class, and the arguments given to it


def resolve(entries: Sequence[str], search: list[Path]) -> list[Made]:
    """The entries of CALLBACKS: a name of BUILTIN, `package.module:Class` or `file.py:Class`
    (sought in the folders of `search`), then arguments as `key=value` words, values as in YAML.
    Raises UsageError."""
    found = []
    for entry in entries:
        name, given = parse(entry)
        made = resolve_class(name, BUILTIN, "callback", search)
        try:
            inspect.signature(made).bind(None, **given)
        except TypeError as error:
            raise UsageError(f"CALLBACKS: {entry!r}: {error}") from None
        found.append((made, given))
    return found


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of an entry. Raises UsageError."""
    try:
        name, *words = shlex.split(text)
        return name, arguments(words)
    except ValueError as error:
        raise UsageError(
            f"CALLBACKS: {text!r} is not a name with key=value arguments ({error})"
        ) from None


def shipped(cfg: CfgNode, task: Any, runtime: Runtime) -> list[type]:
    """The classes of the launcher's own optional parts that this config asks for, on this rank.

    They are imported here, before any loader worker is forked: one that is forked while another
    thread imports a module cannot import it.
    """
    from launcher.callbacks.data_advice import DataAdvice
    from launcher.callbacks.disk_space import DiskSpace
    from launcher.callbacks.log_lines import LogLines
    from launcher.callbacks.system import SystemFigures

    classes: list[type] = [LogLines, DataAdvice, DiskSpace, SystemFigures]
    if cfg.MODEL.SWA_START:
        from launcher.callbacks.swa import Swa

        classes.append(Swa)
    if runtime.is_main:
        from launcher.callbacks.digests import Digests
        from launcher.callbacks.spikes import Spikes

        classes += [Digests, Spikes]
        if cfg.DEBUG.OVERFIT_BATCHES:
            from launcher.callbacks.overfit import Overfit

            classes.append(Overfit)
    if runtime.rank == cfg.DEBUG.BREAK_RANK:
        from launcher.callbacks.break_rank import BreakRank

        classes.append(BreakRank)
    if cfg.MODEL.COMPILE:
        from launcher.callbacks.compiled import Compiled

        classes.append(Compiled)
    if cfg.DEBUG.NONFINITE:
        from launcher.callbacks.nonfinite import Nonfinite

        classes.append(Nonfinite)
    if runtime.distributed:
        from launcher.callbacks.stragglers import Stragglers

        classes.append(Stragglers)
    if runtime.topology.launched_by == "torchrun":
        from launcher.callbacks.shutdown_advice import ShutdownAdvice

        classes.append(ShutdownAdvice)
    if cfg.LOG.COUNT_FLOPS or hasattr(task, "flops"):
        from launcher.callbacks.throughput import Throughput

        classes.append(Throughput)
    if cfg.LOG.HISTOGRAMS and cfg.LOG.TENSORBOARD:
        from launcher.callbacks.histograms import Histograms

        classes.append(Histograms)
    if cfg.LOG.TENSORBOARD and runtime.is_main:
        from launcher.callbacks.tensorboard import TensorBoard

        classes.append(TensorBoard)
    if runtime.is_main and cfg.LOG.MODEL_SUMMARY:
        from launcher.callbacks.model_summary import ModelSummary

        classes.append(ModelSummary)
    if cfg.DEBUG.MEMORY:
        from launcher.callbacks.memory_history import MemoryHistory

        classes.append(MemoryHistory)
    if cfg.DEBUG.PROFILE:
        from launcher.callbacks.profile import Profile

        classes.append(Profile)  # after the others, whose work is not the step's
    if cfg.LOG.PROGRESS_BAR and runtime.is_main and sys.stderr.isatty():
        from launcher.callbacks.progress_bar import ProgressBar

        classes.append(ProgressBar)
    return classes
