"""Pictures, histograms and texts on their way to a sink: taken on the device, finished in the
thread that writes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

BUCKETS = 30  # TensorBoard shows as many


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

    kind: str  # "image" (N, C, H, W), "histogram" (a row a name, see `spread`) or "text"
    names: list[str]
    value: OnHost | str
    step: int
    time: float = field(default_factory=time.time)

    @property
    def nbytes(self) -> int:
        return len(self.value) if isinstance(self.value, str) else self.value.host.nbytes


@torch.no_grad()
def spread(values: torch.Tensor) -> torch.Tensor:
    """How the finite values of a tensor are spread: the least, the largest, their sum, the sum of
    their squares, and how many lie in each of BUCKETS equal parts between the first two. float64
    on the tensor's device, shape (4 + BUCKETS,). Never waits for the device; the same on every
    call."""
    # In double precision: the edges between two denormal numbers are the same in single precision.
    flat = values.detach().flatten().float().double()
    finite = flat.isfinite()
    low = flat.where(finite, torch.inf).min()
    high = flat.where(finite, -torch.inf).max()
    summed = flat.where(finite, 0.0)
    place = ((flat - low) * (BUCKETS / (high - low))).nan_to_num(0.0).clamp(max=BUCKETS - 1)
    # What is not finite lies beyond all buckets. Sorted, not counted: that would wait, or add in
    # whatever order the device takes.
    ordered = place.where(finite, BUCKETS).to(torch.uint8).sort().values
    edges = torch.arange(BUCKETS + 1, dtype=torch.uint8, device=flat.device)
    counts = torch.searchsorted(ordered, edges).diff()
    figures = torch.stack([low, high, summed.sum(), summed.square().sum()])
    return torch.cat([figures, counts.double()])
