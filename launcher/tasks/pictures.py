"""Pictures made of tensors alone, for a task's recorder."""

from __future__ import annotations

import torch


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
