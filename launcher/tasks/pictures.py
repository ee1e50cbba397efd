"""Pictures for a task's recorder: what it takes for one, and some made of tensors alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BUCKETS = 30  # TensorBoard shows as many


def picture(image: Any) -> torch.Tensor:
    """An image as a tensor of shape (N, C, H, W), uint8 or floating-point; ValueError for what is
    none."""
    tensor = torch.as_tensor(image).detach()
    shape = tuple(tensor.shape)
    tensor = tensor[(None,) * (4 - len(shape))]
    if len(shape) not in (2, 3, 4) or tensor.shape[1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"an image has the shape (H, W), (C, H, W) or (N, C, H, W) with 1, 3 or 4 channels, "
            f"not {shape}"
        )
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"an image is uint8, or floating-point from 0 to 1, not {tensor.dtype}")
    return tensor.float().nan_to_num(0.0)


def drawn(figure: Any) -> torch.Tensor:
    """A matplotlib figure as an image of shape (3, H, W); its canvas stays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # whose figure it is

    shown_in = figure.canvas
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.array(canvas.buffer_rgba()))[..., :3]
    figure.set_canvas(shown_in)
    return pixels.permute(2, 0, 1)


def enlarge(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Every pixel of (..., H, W) as a square."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def heat(counts: torch.Tensor, cell: int = 24) -> torch.Tensor:
    """A matrix of counts as an image of shape (3, H, W): a row's cells by their shares of it, from
    black to white on the diagonal and to red off it."""
    shares = counts.float() / counts.sum(1, keepdim=True).clamp_min(1)
    red = shares**0.25  # the few mistakes are what one looks for
    rest = torch.where(torch.eye(len(counts), dtype=torch.bool), red, 0.0)
    return enlarge(torch.stack([red, rest, rest]), cell)


def grid(images: torch.Tensor, columns: int = 8, factor: int = 6, gap: int = 4) -> torch.Tensor:
    """Images of shape (N, C, H, W), values 0 to 1, side by side as one of shape (C, H, W)."""
    images = torch.nn.functional.pad(enlarge(images, factor), (0, gap, 0, gap), value=0.5)
    missing = -len(images) % columns
    images = torch.cat([images, torch.full_like(images[:1], 0.5).expand(missing, -1, -1, -1)])
    rows, (_, channels, height, width) = len(images) // columns, images.shape
    tiles = images.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, rows * height, columns * width)


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
