"""The detection example with torchmetrics' metric in the place of COCO's own evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torchmetrics.detection import MeanAveragePrecision

from examples.detection import Detection


class Torchmetrics(Detection):
    def start(self) -> Any:
        return MeanAveragePrecision(
            "xywh",
            iou_type=("bbox", "segm"),
            # COCO's. Those that torchmetrics has are rounded to single precision: 0.6 lies above
            # 3/5, which masks of a few pixels overlap by.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            # What all ranks returned comes here, so nothing is left to be exchanged.
            sync_on_compute=False,
        )

    def merge(self, folded: Any, outputs: dict[str, list[Any]]) -> Any:
        folded.update(*(as_tensors(outputs[name]) for name in ("found", "truth")))
        return folded

    def summarize(self, folded: Any) -> dict[str, float]:
        found = folded.compute()
        kinds = {"": "bbox", "mask_": "segm"}
        names = ("map", "map_50", "map_75")
        return {f"{to}{name}": found[f"{of}_{name}"] for to, of in kinds.items() for name in names}


def as_tensors(images: list[list[dict[str, Any]]]) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "boxes": torch.tensor([o["bbox"] for o in objects]),
            "labels": torch.tensor([o["category_id"] for o in objects]),
            "scores": torch.tensor([o["score"] for o in objects]),
            "masks": torch.tensor(rle.decode([o["segmentation"] for o in objects]))
            .permute(2, 0, 1)
            .bool(),
        }
        for objects in images
    ]
