"""What can be tried in seconds, before a run of hours. Run it with: pytest"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from images import CLASSES, Shapes
from torch.utils.data import default_collate

from launcher.config import load_config
from launcher.tasks import resolve_task

CONFIG = Path(__file__).with_name("images.yaml")


def make(*overrides: str) -> Any:
    """The task, with its config, outside a run."""
    config = load_config(str(CONFIG), overrides, resolve_task)
    assert config.task is not None
    return config.task(config.cfg)


def test_the_data_are_the_same_each_time_and_of_all_classes() -> None:
    a, b = Shapes("val", 100, 20), Shapes("val", 100, 20)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert set(a.labels.tolist()) == set(range(len(CLASSES)))
    assert not torch.equal(a.images, Shapes("train", 100, 20).images)


def test_it_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    task = make("TASK.SAMPLES", "32")
    model, data = task.build_model(), task.build_dataset("train")
    batch = default_collate([data[i] for i in range(32)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.train_step(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_an_evaluation_has_a_value_a_sample_and_means_what_training_means() -> None:
    task = make()
    model, data = task.build_model().eval(), task.build_dataset("val")
    batch = default_collate([data[i] for i in range(8)])
    values, means = task.eval_step(model, batch), task.train_step(model, batch)
    assert values["loss"].shape == values["accuracy"].shape == (8,)
    for name in task.metrics():
        torch.testing.assert_close(values[name].float().mean(), means[name])


def test_a_step_an_evaluation_and_a_save() -> None:
    command = [sys.executable, "-m", "launcher", "train", "--config-file", CONFIG, "--dry-run"]
    subprocess.run(command, cwd=CONFIG.parent, check=True)
