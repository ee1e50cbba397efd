"""What all loops share: the model, the data and the clock. A loop is called with one JSON object:

data    "tensors": a TensorDataset; "plain": a Dataset that draws nothing; "draws": one that draws a
        random number for each sample; "slow": one that takes a millisecond of CPU for each
        ("length": so many samples, the same ones again and again)
steps, batch, workers, out (a folder), epochs (instead of steps; then each ends with a checkpoint,
        and a loop goes on from one that is there)
device  "cpu" or "cuda": the loop by hand and the launcher alone
kill    the step at which rank 1 kills itself, in torchrun's first attempt

Every training forward pass notes the time, so a step is what lies between two of them.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RATE, MOMENTUM, LOG_EVERY = 0.05, 0.9, 10
NOTED: list[tuple[float, float]] = []  # the clock and the CPU time of the thread, a step each


def spec() -> SimpleNamespace:
    found = {"steps": 0, "epochs": 0, "batch": 64, "workers": 0, "data": "tensors", "length": 0}
    return SimpleNamespace(**(found | {"kill": 0, "device": "cpu"} | json.loads(sys.argv[-1])))


ASKED = spec()
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def note() -> None:
    NOTED.append((time.perf_counter(), time.thread_time()))
    if len(NOTED) == ASKED.kill and FIRST_ATTEMPT and os.environ["RANK"] == "1":
        Path(ASKED.out, "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if len(NOTED) == 2 and ASKED.kill and not FIRST_ATTEMPT and os.environ["RANK"] == "0":
        Path(ASKED.out, "again").write_text(str(time.time()))


def report(asked: SimpleNamespace) -> None:
    """Rank 0's word, at the end of its process."""
    if os.environ.get("RANK", "0") != "0":
        return
    import psutil

    begun = psutil.Process().create_time() - time.time() + time.perf_counter()
    told = {
        "steps": NOTED,
        # From the start of the process over its first update.
        "first": NOTED[1][0] - begun if len(NOTED) > 1 else None,
        "whole": time.perf_counter() - begun,
        "cpu": sum(os.times()[:4]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(asked.out, "told.json").write_text(json.dumps(told))


def build_model() -> Any:
    import torch
    from torch import nn

    class Net(nn.Sequential):
        def forward(self, x: Any) -> Any:
            if self.training:
                note()
            return super().forward(x)

    torch.manual_seed(0)
    return Net(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


def build_optimizer(weights: Any) -> Any:
    import torch

    return torch.optim.SGD(weights, RATE, MOMENTUM, fused=True)


def loader_options(asked: SimpleNamespace) -> dict[str, Any]:
    """What every DataLoader is made with, beside its batch size."""
    workers = asked.workers
    pin = asked.device == "cuda"
    same = {"persistent_workers": workers > 0, "drop_last": True}
    return {"num_workers": workers, "pin_memory": pin, **same}


def build_data(kind: str, length: int = ASKED.length) -> Any:
    import numpy as np
    import torch
    from torch.utils.data import Dataset, TensorDataset

    # As launcher/tasks/digits.py, which the other loops cannot import at no cost to them.
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(file, np.float32, delimiter=","))
    images, labels = rows[:, :64].view(-1, 1, 8, 8) / 16, rows[:, 64].long()
    if kind == "tensors":
        return TensorDataset(images, labels)

    class Digits(Dataset):
        def __len__(self) -> int:
            return length or len(images)

        def __getitem__(self, i: int) -> Any:
            i %= len(images)
            if kind == "draws":
                return images[i] * torch.rand(()), labels[i]
            if kind == "slow":
                end = time.thread_time() + 0.001
                while time.thread_time() < end:
                    pass
            return images[i], labels[i]

    return Digits()
