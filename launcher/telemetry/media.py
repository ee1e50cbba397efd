"""Pictures, histograms and texts on their way to a sink: taken on the device, finished in the
thread that writes."""

from __future__ import annotations

import struct
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

BUCKETS = 30  # TensorBoard shows as many


class OnHost:
    """A tensor's way to the host. Who takes it does not wait; `read` does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        self.copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Page-locked, so that the copy runs beside the training.
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.host = tensor.to("cpu", copy=True)

    def read(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()  # in the writing thread: the training does not wait
        return self.host.numpy()


@dataclass
class Media:
    """Something to show that is no number, under a name (several histograms: names) and a step."""

    kind: str  # "image", "histogram" or "text"
    names: list[str]
    value: OnHost | str
    step: int
    time: float = field(default_factory=time.time)

    @property
    def nbytes(self) -> int:
        return len(self.value) if isinstance(self.value, str) else self.value.host.nbytes


def picture(image: Any) -> torch.Tensor:
    """An image as a tensor of shape (N, C, H, W), uint8 or floating-point; ValueError for what is
    none."""
    tensor = torch.as_tensor(image).detach()
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() == 3:
        tensor = tensor[None]
    if tensor.dim() != 4 or tensor.shape[1] not in (1, 3, 4) or 0 in tensor.shape:
        raise ValueError(
            f"an image has the shape (H, W), (C, H, W) or (N, C, H, W) with 1, 3 or 4 channels, "
            f"not {tuple(torch.as_tensor(image).shape)}"
        )
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"an image is uint8, or floating-point from 0 to 1, not {tensor.dtype}")
    return tensor.float()


def png(image: np.ndarray) -> bytes:
    """An image of shape (C, H, W), uint8 or from 0 to 1, as a PNG file (W3C's specification).

    So short that it is no reason to need an image library.
    """
    if image.dtype != np.uint8:
        image = (np.nan_to_num(image).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    channels, height, width = image.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(height, width * channels)
    lines = np.insert(rows, 0, 0, axis=1).tobytes()  # each begins with its filter: none

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = zlib.compress(lines, 6)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@torch.no_grad()
def spread(values: torch.Tensor) -> torch.Tensor:
    """A tensor's least and largest finite value, and how many lie in each of BUCKETS equal parts
    between them: float64 on its device. Never waits for the device; the same on every call."""
    flat = values.detach().flatten().float()
    finite = torch.isfinite(flat)
    low = torch.where(finite, flat, torch.inf).min()
    high = torch.where(finite, flat, -torch.inf).max()
    edges = low + (high - low) * torch.linspace(0, 1, BUCKETS + 1, device=flat.device)
    edges[-1] = high
    # Infinity lies beside all edges; NaN, which has no place in an order, goes with it.
    ordered = torch.where(flat.isnan(), torch.inf, flat).sort().values
    below = torch.searchsorted(ordered, edges)
    below[-1] = torch.searchsorted(ordered, high[None], right=True)[0]
    return torch.cat([low[None].double(), high[None].double(), below.diff().double()])


def buckets(found: np.ndarray) -> np.ndarray | None:
    """What `spread` gave as rows of (from, to, count); None where no value was finite."""
    low, high, counts = found[0], found[1], found[2:]
    if not np.isfinite([low, high]).all():
        return None
    if low == high:
        return np.array([[low - 0.5, high + 0.5, counts.sum()]])
    edges = np.linspace(low, high, len(counts) + 1)
    return np.stack([edges[:-1], edges[1:], counts], axis=1)
