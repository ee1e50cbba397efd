"""Classes of images: those of a folder of class folders, or those that a list file names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.config.coerce import expand
from launcher.config.problem import Mistake
from launcher.errors import UsageError
from launcher.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launcher.datasets import ListFile

KEYS = {"train": "TRAIN", "val": "VAL"}  # where each split's images are


class ImageList(Task):
    """A residual network on images of your own. TRAIN and VAL are both a folder of class folders
    (ImageFolder), or both a list file of `path label` lines (ListFile)."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode(
            {
                "TRAIN": "",  # a folder of class folders, or a list file
                "VAL": "",
                "SIZE": 224,  # of what the model sees, each side
                "SCALE": [0.08, 1.0],  # in training, the random crop's share of the image's area
                "FLIP": 0.5,  # chance of mirroring
                "COLOUR": 0.4,  # most by which brightness, contrast and saturation change
                "CROP": 0.875,  # in an evaluation, the centre crop's share of the shorter side
                "MEAN": [0.485, 0.456, 0.406],  # of each channel, from 0 to 1: ImageNet's
                "STD": [0.229, 0.224, 0.225],
                "WIDTH": 64,  # channels of the first stage; each next one has twice as many
                "BLOCKS": [2, 2, 2, 2],  # of each stage: this is ResNet-18
            }
        )

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "accuracy"]

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.found: dict[str, ListFile] = {}
        task = cfg.TASK
        low, high = [*task.SCALE, 0.0, 0.0][:2]
        for right, rule in (
            (task.SIZE >= 1, "TASK.SIZE must be at least 1"),
            (len(task.SCALE) == 2 and 0 < low <= high <= 1, "TASK.SCALE is [least, most], up to 1"),
            (0 <= task.FLIP <= 1, "TASK.FLIP is from 0 to 1"),
            (0 <= task.COLOUR <= 1, "TASK.COLOUR is from 0 to 1"),
            (0 < task.CROP <= 1, "TASK.CROP is above 0 and at most 1"),
            (len(task.MEAN) == 3, "TASK.MEAN has 3 numbers"),
            (len(task.STD) == 3 and min(task.STD) > 0, "TASK.STD has 3 numbers above 0"),
            (task.WIDTH >= 8 and task.WIDTH % 8 == 0, "TASK.WIDTH must be a multiple of 8"),
            (task.BLOCKS and min(task.BLOCKS) >= 1, "TASK.BLOCKS are at least 1 each"),
        ):
            if not right:
                raise UsageError(f"{rule}, not {task[rule.split()[0].removeprefix('TASK.')]}")

    def build_model(self) -> nn.Module:
        from launcher.tasks.resnet import resnet

        task = self.cfg.TASK
        return resnet(self._images("train").classes, task.WIDTH, task.BLOCKS, task.SIZE)

    def build_dataset(self, split: str) -> Any:
        return self._images(split)

    def _images(self, split: str) -> ListFile:
        """A split's images, listed once."""
        if split not in self.found:
            self.found[split] = self._listed(split)
        return self.found[split]

    def _listed(self, split: str) -> ListFile:
        import numpy as np

        from launcher.datasets import ImageFolder, ListFile
        from launcher.datasets.augment import Augmented, Input

        if split not in KEYS:
            raise UsageError(f"image-list has the splits {' and '.join(KEYS)}, not {split!r}")
        task, key = self.cfg.TASK, f"TASK.{KEYS[split]}"
        if not task[KEYS[split]]:
            raise UsageError(f"{key} names no images: a folder of class folders, or a list file")
        try:
            path = expand(task[KEYS[split]])
        except Mistake as mistake:
            raise UsageError(f"{key}: {mistake}") from mistake
        if not os.path.exists(path):
            raise UsageError(f"{key}: there is no file or folder {path}")
        look = (task.SIZE, task.MEAN, task.STD)
        known = None if split == "train" else self._images("train")
        transform: Input = Input(*look, task.CROP)
        if known is None:
            transform = Augmented(*look, task.SCALE, task.FLIP, task.COLOUR)
        is_folder = os.path.isdir(path)
        if known is not None and is_folder != isinstance(known, ImageFolder):
            raise UsageError(
                "TASK.TRAIN and TASK.VAL are both folders, or both list files: the classes of a "
                "folder have names, those of a list file numbers"
            )
        if is_folder:
            images: ListFile = ImageFolder(path, getattr(known, "names", None), transform)
        else:
            images = ListFile(path, transform=transform)
        strange = images.labels < 0 if known is None else ~np.isin(images.labels, known.labels)
        for i in np.flatnonzero(strange)[:1]:
            why = (
                "below 0" if known is None else f"none of those that TASK.TRAIN ({known.path}) has"
            )
            raise UsageError(f"{images.place(i)}: class {images.labels[i]} is {why}")
        return images

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = model(images)
        losses = cross_entropy(logits, labels, reduction="none")
        return {"loss": losses, "accuracy": logits.argmax(1) == labels}
