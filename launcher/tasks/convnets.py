"""The two models of the digits task."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def convnet(dropout: float) -> nn.Module:
    """A small convolutional net for images of shape (B, 1, 8, 8).

    Group norm, not batch norm, so that a sample's result does not depend on its batch's other
    samples: training is then the same at any number of ranks.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64 * 4 * 4, 10),
    )


def lenet(dropout: float) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) for images of shape (B, 1, 8, 8), scaled up to 32x32."""
    return nn.Sequential(
        nn.Upsample(size=(32, 32), mode="bilinear"),
        nn.Conv2d(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


MODELS: dict[str, Callable[[float], nn.Module]] = {"convnet": convnet, "lenet": lenet}
