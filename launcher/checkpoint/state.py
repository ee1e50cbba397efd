"""The training state: everything that must survive a restart, as plain tensors and plain values."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from launcher.callbacks import Callbacks
from launcher.config import CfgNode, parse_duration
from launcher.data.splits import Data
from launcher.log import get_logger
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.telemetry.environment import versions
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import strict

logger = get_logger(__name__)


@dataclass
class TrainingState:
    """The live objects of a run, saved and loaded together. This is the whole of a state.pt:

    config          the resolved config, as YAML
    progress        {"step", "epoch", "samples"}
    model, optimizer, scaler, ema    their state_dicts; ema None without an average
    due             what was due at this step, and is left to the next attempt
    recorded, evaluated    the last step that was: once is enough
    finished        which callback has completed the run here, or ""
    agreed          what ranks ask for and have not seen yet, by steps on their way (CUDA)
    dataset_length  of the training data
    stream          where the stream of an iterable data set was, or None
    files           bytes of the files that grow with the records, by name
    ranks           a dict for each rank: "random" (its generators), "recorder" (sums since the last
                    record), "threads" (that it computes with: sums depend on it), "callbacks"
                    (the state_dict of each that has one), "asked" (by them, for the next step; a
                    stop is for this attempt alone)

    All but `ranks` is the same on every rank.
    """

    cfg: CfgNode
    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
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

    @property
    def progress(self) -> Progress:
        return self.recorder.progress

    def is_finished(self) -> bool:
        """Whether TRAIN.DURATION is over, or a callback has completed the run."""
        duration = parse_duration(self.cfg.TRAIN.DURATION)
        assert duration is not None  # the config check demands one
        return self.progress.reached(duration) or bool(self.finished)

    def capture(self, runtime: Runtime) -> dict[str, Any] | None:
        """The state as rank 0 saves it; None on the other ranks. A collective.

        Tensors are those of the live objects, not copies.
        """
        ranks = runtime.gather(
            {
                "random": random_state(),
                "recorder": self.recorder.state(),
                "threads": torch.get_num_threads(),
                "callbacks": self.callbacks.state_dict(),
                "asked": {k: v for k, v in self.callbacks.asked.items() if k != "stop"},
            }
        )
        if ranks is None:
            return None
        return {
            "config": self.cfg.dump(),
            "progress": self.progress.as_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "due": list(self.due),
            "recorded": self.recorded,
            "evaluated": self.evaluated,
            "finished": self.finished,
            "agreed": self.agreed,
            "dataset_length": self.data.length,
            "stream": self.data.stream_state(self.progress.samples),
            "files": self.directory.positions(),
            "ranks": ranks,
        }

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
        self, saved: dict[str, Any], runtime: Runtime, changed: Collection[str] = ()
    ) -> None:
        """Load what `capture` gave into the live objects of this rank; `config`, `dataset_length`,
        `stream` and `files` are for those who go on from it (engine/resume.py).

        On another number of ranks the sums of the interrupted logging period go to rank 0, and
        ranks without a random state of their own keep the one they were seeded with. Keys of OPTIM.
        and TRAIN.PRECISION that are among the `changed` ones take effect.
        """
        self.model.load_state_dict(saved["model"])
        self._restore_optimizer(saved["optimizer"], changed)
        if self.scaler.is_enabled() and saved["scaler"]:  # fp16, now and then
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        elif self.ema is not None:  # an average that is new to the run begins here
            self.ema.module.load_state_dict(saved["model"])
        self.progress.__dict__.update(saved["progress"])
        for name in ("due", "recorded", "evaluated", "finished", "agreed"):
            setattr(self, name, saved[name])
        ranks = saved["ranks"]
        self.callbacks.load_state_dict(ranks[min(runtime.rank, len(ranks) - 1)]["callbacks"])
        if runtime.rank < len(ranks):
            set_random_state(ranks[runtime.rank]["random"])
            self.threads = ranks[runtime.rank]["threads"]
        if len(ranks) == runtime.world_size:
            ours = [ranks[runtime.rank]]
        else:
            ours = ranks if runtime.is_main else []
        for rank in ours:
            self.recorder.add_state(rank["recorder"])
            self.callbacks.asked.update(rank["asked"])

    def _restore_optimizer(self, saved: dict[str, Any], changed: Collection[str]) -> None:
        if "OPTIM.NAME" in changed:
            logger.warning("OPTIM.NAME is another: the optimiser's state begins afresh")
            return
        given = [{**group, "params": None} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved)
        if any(key.startswith("OPTIM.") for key in changed):
            for group, new in zip(self.optimizer.param_groups, given, strict=True):
                group.pop("initial_lr", None)  # the schedule's: of the rate before
                group.update({**new, "params": group["params"]})


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators of this process."""
    name, words, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(words, np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
