"""Where are the shapes on an image, and which are they? Images of different sizes with any number
of objects, a batch made by the task, and a metric that is no mean.

For your own images: let `build_dataset` return them, each with its boxes and labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d, pad
from torch.utils.data import Dataset

from launcher import CfgNode, Task

CLASSES = ("disc", "square")
CELL, MOST = 4, 8  # pixels of a cell's side; the most objects that are found on an image

Objects = dict[str, torch.Tensor]  # boxes (n, 4) as left, top, right, bottom; labels (n,)


class Shapes(Dataset):
    """Drawn grey images with one to three objects, the same for every SEED. In training they are
    mirrored at random; the launcher seeds that by epoch and sample.
    """

    def __init__(self, split: str, count: int) -> None:
        self.mirrors = split == "train"
        random = torch.Generator().manual_seed(0 if split == "train" else 1)
        self.drawn = [self.draw(random) for _ in range(count)]

    def draw(self, random: torch.Generator) -> tuple[torch.Tensor, Objects]:
        height, width = torch.randint(32, 49, (2,), generator=random).tolist()
        image = 0.1 * torch.randn(1, height, width, generator=random)
        rows, columns = torch.arange(height).view(-1, 1) + 0.5, torch.arange(width) + 0.5
        boxes: list[list[float]] = []
        labels: list[int] = []
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            label = int(torch.randint(len(CLASSES), (), generator=random))
            half, y, x, bright = torch.rand(4, generator=random).tolist()
            half = 4 + 3 * half
            y, x = half + (height - 2 * half) * y, half + (width - 2 * half) * x
            box = [x - half, y - half, x + half, y + half]
            if boxes and overlaps(torch.tensor([box]), torch.tensor(boxes)).max() > 0:
                continue
            down, across = (rows - y).abs() / half, (columns - x).abs() / half
            away = (down**2 + across**2).sqrt() if label == 0 else torch.maximum(down, across)
            image += (0.4 + 0.6 * bright) * (away < 1)
            boxes.append(box)
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Objects]:
        image, objects = self.drawn[index]
        if self.mirrors and torch.rand(()) < 0.5:
            left, top, right, bottom = objects["boxes"].unbind(1)
            width = image.shape[-1]
            mirrored = torch.stack([width - right, top, width - left, bottom], 1)
            return image.flip(-1), {**objects, "boxes": mirrored}
        return image, objects


class Detector(nn.Module):
    """For each cell: whether it holds the centre of an object of a class, and how far the sides of
    that object's box are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            *((1, width, 2), (width, 2 * width, 2)),
            *((2 * width, 2 * width, 1), (2 * width, 2 * width, 1)),
        ):
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [layer, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.centres = nn.Conv2d(2 * width, len(CLASSES), 1)
        self.sides = nn.Conv2d(2 * width, 4, 1)
        nn.init.constant_(self.centres.bias, -3.0)  # most cells hold none

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(images)
        return self.centres(x), CELL * self.sides(x).exp()


class Boxes(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 16, "SAMPLES": 600})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["ap50", *(f"ap50_{name}" for name in CLASSES)]

    def build_model(self) -> nn.Module:
        return Detector(self.cfg.TASK.WIDTH)

    def build_dataset(self, split: str) -> Dataset:
        return Shapes(split, self.cfg.TASK.SAMPLES if split == "train" else 150)

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Images in one tensor, padded at the right and below; objects as a list."""
        images, objects = zip(*samples, strict=True)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        return {"images": torch.stack(padded), "objects": list(objects)}

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Means over the objects, whose number is therefore the weight of the batch: over all ranks
        and micro-batches it is the mean over all objects of the step."""
        centres, sides = model(batch["images"])
        boxes = torch.cat([o["boxes"] for o in batch["objects"]])
        labels = torch.cat([o["labels"] for o in batch["objects"]])
        counts = [len(o["labels"]) for o in batch["objects"]]
        image = torch.repeat_interleave(torch.tensor(counts)).to(labels.device)
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / (2 * CELL)).long().unbind(1)

        wanted = torch.zeros_like(centres)
        wanted[image, labels, y, x] = 1
        unsure = (
            wanted - centres.sigmoid()
        ).abs()  # a focal loss: cells that are clear count little
        each = binary_cross_entropy_with_logits(centres, wanted, reduction="none")
        loss_centres = (unsure**2 * each).sum() / len(labels)
        loss_boxes = (1 - overlaps(around(x, y, sides[image, :, y, x]), boxes, each=True)).mean()
        losses = {"loss_centres": loss_centres, "loss_boxes": loss_boxes}
        return {"loss": loss_centres + loss_boxes, **losses, "weight": len(labels)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, list[Any]]:
        """Lists with an entry a sample: `summarize` gets one, in the data set's order."""
        centres, sides = model(batch["images"])
        found = [surest(*one) for one in zip(centres.sigmoid(), sides, strict=True)]
        there = batch["objects"]
        return {"found": [on_cpu(o) for o in found], "there": [on_cpu(o) for o in there]}

    def summarize(self, outputs: dict[str, list[Objects]]) -> dict[str, float]:
        """The average precision of each class, and their mean."""
        found, there = outputs["found"], outputs["there"]
        of_class = {
            f"ap50_{name}": average_precision(found, there, label)
            for label, name in enumerate(CLASSES)
        }
        return {"ap50": sum(of_class.values()) / len(CLASSES), **of_class}


def around(x: torch.Tensor, y: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) from cells and how far the sides are from their middles."""
    middle = CELL * (torch.stack([x, y], 1) + 0.5)
    return torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], 1)


def surest(sure: torch.Tensor, sides: torch.Tensor) -> Objects:
    """The cells of one image that are surer than their neighbours."""
    peaks = torch.where(sure == max_pool2d(sure, 3, 1, 1), sure, 0)
    scores, at = peaks.flatten().topk(MOST)
    labels, cell = at // sure[0].numel(), at % sure[0].numel()
    y, x = cell // sure.shape[2], cell % sure.shape[2]
    return {"boxes": around(x, y, sides[:, y, x].T), "labels": labels, "scores": scores}


def overlaps(a: torch.Tensor, b: torch.Tensor, each: bool = False) -> torch.Tensor:
    """Intersection over union of boxes: (n, m) of all with all, or (n,) of `each` with its own."""
    if not each:
        a = a.unsqueeze(1)
    shared = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    common = shared.clamp(min=0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return common / (areas - common)


def average_precision(found: list[Objects], there: list[Objects], label: int) -> float:
    """The area under precision over recall. From the surest on, a found object is right if it
    overlaps one by half that none before it has found."""
    scores: list[float] = []
    right: list[bool] = []
    for ours, truth in zip(found, there, strict=True):
        left = truth["boxes"][truth["labels"] == label]
        mine = ours["labels"] == label
        order = ours["scores"][mine].argsort(descending=True)
        for box, score in zip(ours["boxes"][mine][order], ours["scores"][mine][order], strict=True):
            shares = overlaps(box.unsqueeze(0), left)[0]
            hit = bool((shares >= 0.5).any())
            if hit:
                left = left[torch.arange(len(left)) != shares.argmax()]
            scores.append(float(score))
            right.append(hit)
    hits = torch.tensor(right, dtype=torch.bool)[
        torch.tensor(scores).argsort(descending=True, stable=True)
    ]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    # At each recall the best precision of that or a higher one.
    best = precision.flip(0).cummax(0).values.flip(0)
    objects = sum(int((truth["labels"] == label).sum()) for truth in there)
    return float(best[hits].sum() / max(objects, 1))


def on_cpu(objects: Objects) -> Objects:
    return {name: values.cpu() for name, values in objects.items()}
