"""What can be tried in seconds, before a run of hours. Run it with: pytest"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from boxes import Shapes, average_precision, overlaps

from launcher.config import load_config
from launcher.tasks import resolve_task

CONFIG = Path(__file__).with_name("boxes.yaml")


def make(*overrides: str) -> Any:
    """The task, with its config, outside a run."""
    config = load_config(str(CONFIG), overrides, resolve_task)
    assert config.task is not None
    return config.task(config.cfg)


def objects(*boxes: list[float], scores: list[float] | None = None) -> dict[str, torch.Tensor]:
    """Objects of class 0."""
    labels = torch.zeros(len(boxes), dtype=torch.long)
    made = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": labels}
    return made if scores is None else {**made, "scores": torch.tensor(scores)}


LEFT, RIGHT, NOWHERE = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def test_overlaps_by_hand() -> None:
    half = torch.tensor([[0.0, 0.0, 10.0, 5.0]])
    assert overlaps(half, torch.tensor([LEFT, RIGHT])).tolist() == [[0.5, 0.0]]
    assert overlaps(half, half, each=True).tolist() == [1.0]


def test_average_precision_by_hand() -> None:
    there = [objects(LEFT, RIGHT), objects(LEFT)]
    perfect = [objects(LEFT, RIGHT, scores=[0.9, 0.8]), objects(LEFT, scores=[0.7])]
    assert average_precision(perfect, there, 0) == 1.0
    # The surest is wrong, the next right, one is found twice, one not at all.
    some = [objects(NOWHERE, LEFT, LEFT, scores=[0.9, 0.8, 0.7]), objects(scores=[])]
    assert abs(average_precision(some, there, 0) - (1 / 2) / 3) < 1e-6
    assert average_precision([objects(scores=[])] * 2, there, 0) == 0.0


def test_a_batch_has_images_of_different_sizes() -> None:
    data = Shapes("val", 6)
    batch = make().collate([data[i] for i in range(6)])
    heights, widths = zip(*(data[i][0].shape[1:] for i in range(6)), strict=True)
    assert len(set(heights)) > 1
    assert batch["images"].shape == (6, 1, max(heights), max(widths))
    assert [len(o["labels"]) for o in batch["objects"]] == [
        len(data[i][1]["labels"]) for i in range(6)
    ]


def test_mirrored_boxes_stay_on_their_objects() -> None:
    data = Shapes("train", 20)
    for index in range(20):
        image, found = data[index]
        for left, top, right, bottom in found["boxes"].round().int().tolist():
            inside = image[0, top:bottom, left:right].mean()
            assert inside > 0.25, "an object is brighter than what is around it"


def test_it_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    task = make("TASK.SAMPLES", "8")
    model, data = task.build_model(), Shapes("val", 8)
    batch = task.collate([data[i] for i in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        task.train_step(model, batch)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        assert task.summarize(task.eval_step(model, batch))["ap50"] > 0.8


def test_a_step_an_evaluation_and_a_save() -> None:
    command = [sys.executable, "-m", "launcher", "train", "--config-file", CONFIG, "--dry-run"]
    subprocess.run(command, cwd=CONFIG.parent, check=True)
