"""From a Pillow image to a model's input: cut out at random for training, in the middle else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from launcher.datasets.image_list import to_tensor


class Input:
    """An image's part, scaled to `size` by `size`, as a normalised float tensor of shape (C, H, W):
    (pixel - mean) / std, with pixels from 0 to 1. This part is the square in the middle whose side
    is `crop` of the image's shorter one: a resize and a centre crop in one."""

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], crop: float = 1.0
    ) -> None:
        self.size, self.crop = size, crop
        self.mean, self.std = (
            torch.tensor([[[m]] for m in mean]),
            torch.tensor([[[s]] for s in std]),
        )

    def __call__(self, image: Any) -> torch.Tensor:
        side = self.crop * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return self._tensor(self._resized(image, left, top, side, side))

    def _resized(self, image: Any, left: float, top: float, width: float, height: float) -> Any:
        from PIL.Image import Resampling

        # By no more than the image has: sums of floats may say a little more.
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        # Very large images are first shrunk by whole numbers, which is fast.
        return image.resize((self.size, self.size), Resampling.BILINEAR, box, reducing_gap=2.0)

    def _tensor(self, image: Any) -> torch.Tensor:
        return (to_tensor(image) - self.mean) / self.std


class Augmented(Input):
    """In training: a part at a random place, whose share of the image's area is drawn from `scale`
    and whose width over height from 3/4 to 4/3; mirrored with the chance `flip`; brightness,
    contrast and saturation each changed by a factor from 1 - `colour` to 1 + `colour`.

    Draws from torch's generator, the same count of numbers for every image.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale: Sequence[float],
        flip: float,
        colour: float,
    ) -> None:
        super().__init__(size, mean, std)
        self.scale, self.flip, self.colour = scale, flip, colour

    def __call__(self, image: Any) -> torch.Tensor:
        from PIL import ImageEnhance
        from PIL.Image import Transpose

        area, ratio, across, down, flip, *colours = torch.rand(8).tolist()
        low, high = self.scale
        area = (low + (high - low) * area) * image.width * image.height
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        width = min(math.sqrt(area * ratio), image.width)
        height = min(math.sqrt(area / ratio), image.height)
        left, top = across * (image.width - width), down * (image.height - height)
        image = self._resized(image, left, top, width, height)
        if flip < self.flip:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            ways = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for way, drawn in zip(ways, colours, strict=True):
                image = way(image).enhance(1 + (2 * drawn - 1) * self.colour)
        return self._tensor(image)
