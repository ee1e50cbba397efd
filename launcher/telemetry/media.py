"""Pictures, histograms and texts on their way to a sink: taken on the device, finished in the
thread that writes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch


class OnHost:
    """A tensor's way to the host. Who takes it does not wait; `read` does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # On CUDA the copy, into page-locked memory, runs beside the training.
        self.host = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.Event() if tensor.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()  # in the writing thread: the training does not wait
        return self.host.numpy()


@dataclass
class Media:
    """Something to show that is no number, under a name (several histograms: names) and a step."""

    kind: str  # "image" (N, C, H, W), "histogram" (a row a name, see tasks/pictures.py) or "text"
    names: list[str]
    value: OnHost | str
    step: int
    time: float = field(default_factory=time.time)

    @property
    def nbytes(self) -> int:
        return len(self.value) if isinstance(self.value, str) else self.value.host.nbytes
