"""Residual networks for images (He et al., 2016), with group norm: a sample's result does not
depend on its batch's other samples, so training is the same at any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

GROUPS = 8  # of channels that are normalised together


class Block(nn.Module):
    """Two convolutions, added to what comes in, which is the block's result at first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        *layers, last = (
            *convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            *convolution(outputs, outputs, 3, 1),
        )
        nn.init.zeros_(last.weight)
        self.path = nn.Sequential(*layers, last)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.path(x) + self.shortcut(x)).relu()


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int
) -> tuple[nn.Conv2d, nn.GroupNorm]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer, nn.GroupNorm(GROUPS, outputs)


def resnet(classes: int, width: int, blocks: Sequence[int], size: int) -> nn.Module:
    """From images (B, 3, size, size) to logits. Stage i has blocks[i] blocks of width * 2^i
    channels, at half the resolution of the one before. Images of 64 and more are first scaled down
    to a quarter. Width 64 and blocks [2, 2, 2, 2] is ResNet-18 but for the norm."""
    if size >= 64:
        stem = [*convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    else:
        stem = [*convolution(3, width, 3, 1), nn.ReLU()]
    stages, inputs = list[nn.Module](), width
    for i, count in enumerate(blocks):
        for k in range(count):
            stages.append(Block(inputs, width * 2**i, stride=2 if i and not k else 1))
            inputs = width * 2**i
    return nn.Sequential(
        *stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    )
