"""Detection with masks, after references/detection/train.py, engine.py and coco_eval.py of
github.com/pytorch/vision.

Kept: lists of images of different sizes, batches of like aspect ratio, flips, a dict of losses that
is summed, AdamW (its --opt adamw) with a first epoch of warm-up and steps, COCO's average precision
of boxes and masks, evaluated batch by batch so that no mask is kept. Needs pycocotools.
Smaller: drawn shapes, and in the place of Mask R-CNN a net of a few layers that tells for each cell
of 4x4 pixels whether an object's centre is there, and that object's box and mask.
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample, max_pool2d, pad
from torch.utils.data import Dataset

from launcher import CfgNode, Task

SHAPES = ("rectangle", "ellipse", "triangle")
STRIDE, CELLS, MOST = 4, 12, 10  # pixels a cell; a mask is predicted in 12x12; objects an image


class Shapes(Dataset):
    """Images in which one to three shapes are drawn, each over those before."""

    def __init__(self, split: str, length: int) -> None:
        self.seed, self.flips = int(split == "train"), split == "train"
        self.sizes = np.random.default_rng(self.seed).integers(36, 53, (length, 2))
        # The bucket of each aspect ratio, for TRAIN.SAMPLER grouped.
        self.groups = np.digitize(self.sizes[:, 1] / self.sizes[:, 0], [0.8, 1.25])
        self.drawn = [self.draw(index) for index in range(length)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, target = self.drawn[index]
        if self.flips and torch.rand(()) < 0.5:
            left, top, right, bottom = target["boxes"].T
            boxes = torch.stack([image.shape[2] - right, top, image.shape[2] - left, bottom], 1)
            image, masks = image.flip(-1), target["masks"].flip(-1)
            target = {**target, "boxes": boxes, "masks": masks}
        return image, target

    def draw(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng, (height, width) = np.random.default_rng([self.seed, index]), self.sizes[index]
        y, x = np.mgrid[:height, :width] + 0.5
        image = rng.uniform(0, 0.4, (3, 1, 1)) + rng.normal(0, 0.05, (3, height, width))
        masks, labels = [], []
        for _ in range(rng.integers(1, 4)):
            label, w, h = rng.integers(len(SHAPES)), *rng.integers(6, 12, 2)
            u, v = (x - rng.uniform(w, width - w)) / w, (y - rng.uniform(h, height - h)) / h
            mask = (np.maximum(abs(u), abs(v)), u**2 + v**2, 2 * abs(u) - v)[label] < 1
            mask &= abs(v) < 1
            image[:, mask] = rng.uniform(0.4, 1, (3, 1))
            masks, labels = [*(m & ~mask for m in masks), mask], [*labels, label]
        seen = np.array([mask.sum() > 40 for mask in masks])
        masks, labels = np.array(masks)[seen], np.array(labels)[seen]
        left, top, w, h = rle.toBbox(encoded(masks)).astype(np.float32).T
        boxes = np.stack([left, top, left + w, top + h], 1)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        return torch.from_numpy(image).float(), {k: torch.from_numpy(v) for k, v in target.items()}

    def collate(self, samples: list[Any]) -> tuple[list[Any], ...]:
        return tuple(map(list, zip(*samples, strict=True)))


class Detector(nn.Module):
    """In training a dict of losses, else what is found in each image, as torchvision's models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers, inside = [], 3
        for stride, dilation in ((2, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 1)):
            layers += [nn.Conv2d(inside, width, 3, stride, dilation, dilation, bias=False)]
            layers += [nn.GroupNorm(4, width), nn.ReLU()]
            inside = width
        self.body = nn.Sequential(*layers)
        self.heat = nn.Conv2d(width, len(SHAPES), 1)
        nn.init.constant_(self.heat.bias, -3.0)  # few cells are centres
        self.box, self.mask = nn.Conv2d(width, 4, 1), nn.Conv2d(width, CELLS**2, 1)

    def forward(self, images: list[torch.Tensor], targets: Any = None) -> Any:
        height, width = np.max([image.shape[1:] for image in images], 0)
        padded = [pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        x = self.body(torch.stack(padded))
        # Of each cell: whether it is a centre, how far the box's sides are, in cells, and the mask.
        parts = [*zip(self.heat(x), self.box(x).exp(), self.mask(x), strict=True)]
        if targets is None:
            return [self.found(i, *part) for i, part in zip(images, parts, strict=True)]
        losses = [self.losses(t, *part) for t, part in zip(targets, parts, strict=True)]
        return {name: torch.stack([loss[name] for loss in losses]).sum() for name in losses[0]}

    def losses(self, target: Any, heat: Any, sides: Any, masks: Any) -> dict[str, torch.Tensor]:
        """Sums over the objects of an image."""
        boxes, labels = target["boxes"] / STRIDE, target["labels"]
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).long().T
        wide, high = (boxes[:, 2:] - boxes[:, :2]).T[..., None, None] / 6
        rows, columns = (torch.arange(n, device=heat.device) for n in heat.shape[1:])
        across = (columns - x[:, None, None]) / wide
        bumps = torch.exp(-(across**2 + ((rows[:, None] - y[:, None, None]) / high) ** 2) / 2)
        wanted = torch.zeros_like(heat)
        for bump, label in zip(bumps, labels, strict=True):
            wanted[label] = torch.maximum(wanted[label], bump)
        sure = heat.sigmoid()
        focus = torch.where(wanted == 1, (1 - sure) ** 2, (1 - wanted) ** 4 * sure**2)
        sought = (wanted == 1).float()
        loss_heat = (focus * binary_cross_entropy_with_logits(heat, sought, reduction="none")).sum()

        place = torch.stack([x, y], 1) + 0.5
        true, ours = torch.cat([place - boxes[:, :2], boxes[:, 2:] - place], 1), sides[:, y, x].T
        shared = area(torch.minimum(true, ours))
        loss_box = -(shared / (area(true) + area(ours) - shared)).log().sum()

        steps = (torch.arange(CELLS, device=heat.device) + 0.5) / CELLS
        size = torch.tensor(target["masks"].shape[:0:-1], device=heat.device)  # width, height
        corners = target["boxes"].view(-1, 2, 2) / size * 2 - 1
        across, down = torch.lerp(corners[:, :1], corners[:, 1:], steps[:, None]).unbind(2)
        places = torch.stack(torch.broadcast_tensors(across[:, None], down[:, :, None]), 3)
        true = grid_sample(target["masks"][:, None].float(), places, align_corners=False)
        ours = masks[:, y, x].T.view(-1, CELLS, CELLS)
        each = binary_cross_entropy_with_logits(ours, true[:, 0], reduction="none").mean((1, 2))
        return {"loss_heat": loss_heat, "loss_box": loss_box, "loss_mask": each.sum()}

    def found(self, image: Any, heat: Any, sides: Any, masks: Any) -> dict[str, torch.Tensor]:
        """The cells that are surer than their neighbours."""
        sure = heat.sigmoid()
        scores, at = torch.where(sure == max_pool2d(sure, 3, 1, 1), sure, 0).flatten().topk(MOST)
        labels, cell = at // sure[0].numel(), at % sure[0].numel()
        y, x = cell // sure.shape[2], cell % sure.shape[2]
        sides, place = sides[:, y, x].T * STRIDE, STRIDE * (torch.stack([x, y], 1) + 0.5)
        height, width = image.shape[1:]
        most = torch.tensor([width, height, width, height], device=heat.device)
        boxes = (
            torch.cat([place - sides[:, :2], place + sides[:, 2:]], 1).clamp(min=0).minimum(most)
        )
        (left, top), (right, bottom) = boxes[:, :2].T[..., None], boxes[:, 2:].T[..., None]
        columns, rows = (torch.arange(n, device=heat.device) + 0.5 for n in (width, height))
        across = (columns - left) / (right - left).clamp(min=1) * 2 - 1
        down = (rows - top) / (bottom - top).clamp(min=1) * 2 - 1
        places = torch.stack(torch.broadcast_tensors(across[:, None], down[:, :, None]), 3)
        small = masks[:, y, x].T.view(-1, 1, CELLS, CELLS)
        inside = grid_sample(small, places, align_corners=False)[:, 0] > 0
        return {"boxes": boxes, "labels": labels, "masks": inside, "scores": scores}


def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks of shape (n, height, width) in COCO's run-length encoding."""
    return rle.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))


def area(sides: torch.Tensor) -> torch.Tensor:
    return (sides[:, :2] + sides[:, 2:]).prod(1)


class Detection(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 24, "IMAGES": 256})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["map", "map_50", "map_75", "mask_map", "mask_map_50", "mask_map_75"]

    def build_model(self) -> nn.Module:
        return Detector(self.cfg.TASK.WIDTH)

    def build_dataset(self, split: str) -> Dataset:
        return Shapes(split, self.cfg.TASK.IMAGES if split == "train" else 64)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Means over the objects, whose number is the weight of the batch."""
        images, targets = batch
        objects = sum(len(target["labels"]) for target in targets)
        losses = {name: loss / objects for name, loss in model(images, targets).items()}
        return {"loss": sum(losses.values()), **losses, "weight": objects}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, list[Any]]:
        images, targets = batch
        sizes = [{"height": image.shape[1], "width": image.shape[2]} for image in images]
        return {"found": annotations(model(images)), "truth": annotations(targets), "size": sizes}

    def start(self) -> dict[str, list[Any]]:
        return {"bbox": [], "segm": []}

    def merge(self, folded: Any, outputs: dict[str, list[Any]]) -> Any:
        """Only which objects were found is kept of a batch."""
        with contextlib.redirect_stdout(io.StringIO()):  # COCO's tools print
            truth, found = (as_coco(outputs[name], outputs["size"]) for name in ("truth", "found"))
            for kind, kept in folded.items():
                evaluation = COCOeval(truth, found, kind)
                evaluation.evaluate()
                images = np.array(evaluation.evalImgs, object)
                kept.append(images.reshape(len(SHAPES), -1, len(outputs["truth"])))
        return folded

    def summarize(self, folded: Any) -> dict[str, float]:
        metrics, told = {}, io.StringIO()
        with contextlib.redirect_stdout(told):
            for kind, prefix in (("bbox", ""), ("segm", "mask_")):
                images, evaluation = np.concatenate(folded[kind], 2), COCOeval(iouType=kind)
                evaluation.evalImgs, params = images.flatten().tolist(), evaluation.params
                params.imgIds, params.catIds = range(images.shape[2]), range(len(SHAPES))
                evaluation._paramsEval = copy.deepcopy(params)
                evaluation.accumulate()
                evaluation.summarize()
                names = (f"{prefix}{name}" for name in ("map", "map_50", "map_75"))
                metrics |= zip(names, evaluation.stats, strict=False)
        self.recorder.text("coco", f"```\n{told.getvalue()}```")
        return metrics


def annotations(images: list[dict[str, torch.Tensor]]) -> list[list[dict[str, Any]]]:
    """Of each image its objects as COCO has them."""
    made = []
    for image in images:
        masks, scores = encoded(image["masks"].cpu().numpy()), image.get("scores", image["labels"])
        columns = (column.tolist() for column in (image["boxes"], image["labels"], scores))
        made.append([annotation(*row) for row in zip(*columns, masks, strict=True)])
    return made


def annotation(box: list[float], label: int, score: float, mask: Any) -> dict[str, Any]:
    left, top, right, bottom = box
    where = {"bbox": [left, top, right - left, bottom - top], "segmentation": mask}
    return {
        **where,
        "area": float(rle.area(mask)),
        "category_id": label,
        "score": score,
        "iscrowd": 0,
    }


def as_coco(images: list[list[dict[str, Any]]], sizes: list[dict[str, int]]) -> COCO:
    made, objects = COCO(), [{**o, "image_id": i} for i, image in enumerate(images) for o in image]
    made.dataset = {
        "images": [{"id": i, **size} for i, size in enumerate(sizes)],
        "categories": [{"id": i} for i in range(len(SHAPES))],
        "annotations": [{**o, "id": i} for i, o in enumerate(objects, 1)],
    }
    made.createIndex()
    return made
