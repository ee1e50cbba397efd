"""The training state: everything that must survive a restart, as plain tensors and plain values."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from launcher.callbacks import Callbacks
from launcher.config import CfgNode, parse_duration
from launcher.data.splits import Data
from launcher.edges.batch import map_tensors
from launcher.edges.generators import random_state, set_random_state
from launcher.edges.model import ModelState, evaluated_model, load_model_state, model_state
from launcher.edges.optimizer import (
    check_groups,
    evaluated,
    flat,
    has_modes,
    load_optimizers,
    made,
    unscheduled,
)
from launcher.edges.state import load_state_of, state_of
from launcher.models.freezing import Freezing
from launcher.optim.curves import SCHEDULED
from launcher.provenance.environment import versions
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.shards.checks import check_alike
from launcher.shards.sums import Shards
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import strict


@dataclass
class TrainingState:
    """The live objects of a run, saved and loaded together. This is the whole of a state.pt:

    config          the resolved config, as YAML
    progress        {"step", "epoch", "samples"}
    model, optimizer, scaler, ema    their state_dicts; ema: the weights that are evaluated, or None
                    where they are the model's
    optimizer_made  how that was made: its class and what was chosen for its groups
                    (with phases these, optimizer and scaler are dicts by phase)
    phases          of each recorded name the phases that have returned it
    beside          what the model's state_dict leaves out: modules in eval mode, other buffers
    due             what was due at this step, and is left to the next attempt
    recorded, evaluated    the last step that was: once is enough
    finished        which callback has completed the run here, and why; or ""
    agreed          what ranks ask for and have not seen yet, by steps on their way (CUDA)
    dataset_length  of the training data
    micro_batch_size    0: no limit
    stream          where the stream of an iterable data set was, or None
    files           bytes of the files that grow with the records, by name
    ranks           a dict for each rank: "random" (its generators), "means" (since the last
                    record), "threads" (that it computes with: sums depend on it), "callbacks"
                    (the state_dict of each that has one), "asked" (by them, for the next step; a
                    stop is for this attempt alone), "reasons" (of those in agreed), "buffers"
                    (its own, where they differ), "task" (its state_dict, or None)

    All but `ranks` is the same on every rank.
    """

    cfg: CfgNode
    model: nn.Module
    optimizers: dict[str, Any]  # by phase; "" where there is one
    scalers: dict[str, torch.amp.GradScaler]
    ema: AveragedModel | None
    freezing: Freezing
    recorder: Recorder
    data: Data
    callbacks: Callbacks
    directory: RunDirectory
    due: list[str] = field(default_factory=list)
    recorded: int = -1
    evaluated: int = -1
    finished: str = ""
    agreed: list[list[str]] = field(default_factory=list)
    threads: int = 0  # those of the attempt before, or 0
    alike: Sequence[str] = ()  # patterns of buffers that are rank 0's everywhere
    task: Any = None
    shards: Shards | None = None  # with TRAIN.SHARDS

    def __post_init__(self) -> None:
        self.config = self.cfg.dump()  # frozen, and as slow as a small step
        duration = parse_duration(self.cfg.TRAIN.DURATION)
        assert duration is not None  # the config check demands one
        self.duration = duration
        self.whole = ModelState(self.model, self.alike)
        self.made = {phase: made(one, self.model) for phase, one in self.optimizers.items()}

    @property
    def progress(self) -> Progress:
        return self.recorder.progress

    @property
    def averages(self) -> bool:
        """Whether the weights that are evaluated are others than those that are trained."""
        return self.ema is not None or any(map(has_modes, self.optimizers.values()))

    def is_finished(self) -> bool:
        """Whether TRAIN.DURATION is over, or a callback has completed the run."""
        return self.progress.reached(self.duration) or bool(self.finished)

    def capture(self, runtime: Runtime) -> dict[str, Any] | None:
        """The state as rank 0 saves it; None on the other ranks. Collectives.

        Tensors are those of the live objects, not copies. Raises RunError where the ranks' weights
        differ, or the model's layout is not what it was at the start.
        """
        for phase, optimizer in self.optimizers.items():
            check_groups(optimizer, self.made[phase])
        buffers = self.whole.of_rank(runtime, self.progress.step)
        ranks = runtime.gather({**self.of_rank(), "buffers": buffers})
        if self.shards is not None:
            check_alike(ranks or [])
        return None if ranks is None else {**self.shared(), "ranks": ranks}

    def of_rank(self) -> dict[str, Any]:
        """What is this rank's own."""
        return {
            "random": random_state(),
            "means": self.recorder.sums.state(),
            "threads": torch.get_num_threads(),
            "callbacks": self.callbacks.state_dict(),
            **self.callbacks.requests(self.agreed),
            "task": state_of(self.task),
        }

    def shared(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        return {
            "config": self.config,
            "progress": self.progress.as_dict(),
            "model": model_state(self.model),
            "optimizer": flat({k: o.state_dict() for k, o in self.optimizers.items()}),
            "optimizer_made": flat(self.made),
            "phases": self.recorder.phases,
            "beside": self.whole.beside(),
            "scaler": flat({k: s.state_dict() for k, s in self.scalers.items()}),
            "ema": self._averaged(),
            "due": list(self.due),
            "recorded": self.recorded,
            "evaluated": self.evaluated,
            "finished": self.finished,
            "agreed": self.agreed,
            "dataset_length": self.data.length,
            "micro_batch_size": self.data.train_plan.micro_batch_size,
            "stream": self.data.stream_state(self.progress.samples),
            "files": self.directory.positions(),
        }

    def _averaged(self) -> dict[str, Any] | None:
        """The weights that are evaluated, where they are not those that are trained."""
        if not self.averages:
            return None
        if self.ema is not None:
            model = evaluated_model(self.model, self.ema)
            weights = {f"module.{n}": t for n, t in model_state(model).items()}
            return {**model_state(self.ema), **weights}
        with evaluated(self.optimizers):
            state = map_tensors(model_state(self.model), torch.clone)
        return {f"module.{name}": value for name, value in state.items()}

    def manifest(self, world_size: int, metrics: dict[str, float]) -> dict[str, Any]:
        """What manifest.json says beside the files; `metrics` are those of this very step."""
        return {
            **self.progress.as_dict(),
            "world_size": world_size,
            "metrics": strict(metrics),
            "time": time.time(),
            "versions": versions(),
        }

    def restore(
        self,
        saved: dict[str, Any],
        runtime: Runtime,
        changed: Collection[str] = (),
        allow: Collection[str] = (),
    ) -> list[str]:
        """Load what `capture` gave into the live objects of this rank; `config`, `dataset_length`,
        `stream` and `files` are for those who go on from it (engine/resume.py).

        On another number of ranks the sums of the interrupted logging period go to rank 0, and
        ranks without a random state of their own keep the one they were seeded with. Of the keys
        that have `changed` all take effect. Returns what was not restored, in words: the state of
        another optimiser, where `allow` has OPTIM.NAME (else UsageError), and the task's own on
        another number of ranks, where it has TASK_STATE (likewise).
        """
        ranks = saved["ranks"]
        same = len(ranks) == runtime.world_size
        own = ranks[runtime.rank]["buffers"] if same else {}
        self.whole.load(saved["model"], saved["beside"], own)
        parts = saved["optimizer"], saved["optimizer_made"]
        afresh = load_optimizers(self.optimizers, self.made, *parts, "OPTIM.NAME" in allow)
        if any(key in changed for key in SCHEDULED):
            for optimizer in self.optimizers.values():
                unscheduled(optimizer)
        for phase, scaler in self.scalers.items():
            state = saved["scaler"].get(phase) if phase else saved["scaler"]
            if scaler.is_enabled() and state:  # fp16, now and then
                scaler.load_state_dict(state)
        self.recorder.phases.update(saved.get("phases", {}))  # an earlier version saved none
        if self.ema is not None and saved["ema"] is not None:
            load_model_state(self.ema, saved["ema"])
        elif self.ema is not None:  # an average that is new to the run begins here
            load_model_state(self.ema.module, saved["model"])
        self.progress.__dict__.update(saved["progress"])
        if self.cfg.TRAIN.MICRO_BATCH_SIZE == "auto" and (size := saved.get("micro_batch_size")):
            self.data.train_plan = replace(self.data.train_plan, micro_batch_size=size)
        for name in ("due", "recorded", "evaluated", "finished", "agreed"):
            setattr(self, name, saved[name])
        self.callbacks.load_state_dict(ranks[min(runtime.rank, len(ranks) - 1)]["callbacks"])
        theirs = [rank.get("task") for rank in ranks]
        afresh += load_state_of(self.task, theirs, runtime, "TASK_STATE" in allow)
        # With shards all ranks are alike, however many there are.
        if (rank := 0 if self.cfg.TRAIN.SHARDS else runtime.rank) < len(ranks):
            self.threads = ranks[rank]["threads"]
            if "SEED" not in changed:
                set_random_state(ranks[rank]["random"])
        if same:
            ours = [ranks[runtime.rank]]
        else:
            ours = ranks if runtime.is_main else []
        for rank in ours:
            self.recorder.sums.merge(rank["means"])
            self.callbacks.add_requests(rank)
        return afresh
