"""The training state: everything that must survive a restart, as plain tensors and plain values."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.telemetry.recorder import Recorder


@dataclass
class TrainingState:
    """The live objects of a run, saved and loaded together."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    progress: Progress
    recorder: Recorder
    threads: int = 0  # that this rank computed with before; sums depend on it
    due: list[str] = field(default_factory=list)  # at this step, and left to the next attempt

    def capture(self, runtime: Runtime) -> dict[str, Any] | None:
        """The state as rank 0 saves it; None on the other ranks. A collective.

        Everything but the random states and the recorder's sums is equal on all ranks, so only
        those are gathered (about 10 kB a rank). Tensors are those of the live objects, not copies.
        """
        ranks = runtime.gather(
            {
                "random": random_state(),
                "recorder": self.recorder.state(),
                "threads": torch.get_num_threads(),
            }
        )
        if ranks is None:
            return None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "progress": self.progress.as_dict(),
            "due": list(self.due),
            "ranks": ranks,
        }

    def restore(self, saved: dict[str, Any], runtime: Runtime) -> None:
        """Load what `capture` gave into the live objects of this rank.

        On another number of ranks the sums of the interrupted logging period go to rank 0, and
        ranks without a random state of their own keep the one they were seeded with.
        """
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.progress.__dict__.update(saved["progress"])
        self.due = list(saved["due"])
        ranks = saved["ranks"]
        if runtime.rank < len(ranks):
            set_random_state(ranks[runtime.rank]["random"])
            self.threads = ranks[runtime.rank]["threads"]
        if len(ranks) == runtime.world_size:
            self.recorder.add_state(ranks[runtime.rank]["recorder"])
        elif runtime.is_main:
            for rank in ranks:
                self.recorder.add_state(rank["recorder"])


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators of this process."""
    name, words, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(words, np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
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
