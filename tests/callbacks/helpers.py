"""What a callback may look at, with the parts that a test cares for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from launcher.callbacks import Run
from launcher.config import defaults
from launcher.data.plan import Plan
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology

CPU = torch.device("cpu")


def view(
    *,
    task: Any = None,
    model: Any = None,
    show: Any = None,
    device: torch.device = CPU,
    topology: Topology | None = None,
    directory: Path = Path("."),
    plan: Plan | None = None,
    **log: Any,
) -> Run:
    """`show` takes what is shown; `log` are keys of LOG."""
    cfg = defaults()
    cfg.LOG.update(log)
    recorder: Any = SimpleNamespace(progress=Progress(), writer=SimpleNamespace(show=show))
    data: Any = SimpleNamespace(train_plan=plan, size=SimpleNamespace(reason="the reason"))
    runtime = Runtime(topology or Topology(), device, CpuBudget(1, 1, 1, ""))
    model = nn.Identity() if model is None else model
    return Run(cfg, task, model, {}, recorder, data, runtime, directory)
