"""What can be tried in seconds, before a run of hours. Run it with: pytest"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gan import SIZE, rings

from launcher.config import load_config
from launcher.tasks import resolve_task

CONFIG = Path(__file__).with_name("gan.yaml")


def make(*overrides: str) -> Any:
    """The task, with its config, outside a run."""
    config = load_config(str(CONFIG), overrides, resolve_task)
    assert config.task is not None
    return config.task(config.cfg)


def test_images_are_of_one_form() -> None:
    task = make()
    real, false = rings(5, seed=0), task.draw(task.build_model(), 5)
    assert real.shape == false.shape == (5, 1, SIZE, SIZE)
    assert all(x.min() >= 0 and x.max() <= 1 for x in (real, false))


def test_each_phase_lowers_its_own_loss() -> None:
    """By hand what the launcher does: the other network's gradients are off meanwhile."""
    for phase in ("discriminator", "generator"):
        torch.manual_seed(0)
        task = make()
        model = task.build_model()
        optimizer = task.build_optimizer(model)[phase]
        model.requires_grad_(False)
        model[phase].requires_grad_(True)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = task.train_step(model, [rings(64, seed=0)], phase)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, phase


def test_the_distance_is_small_for_what_is_alike() -> None:
    task = make()
    real, like = rings(300, seed=1).flatten(1), rings(300, seed=2).flatten(1)
    same = task.summarize({"real": real, "false": like})["distance"]
    noise = task.summarize({"real": real, "false": torch.rand_like(real)})["distance"]
    assert same < 0.05 < 0.2 < noise


def test_a_step_an_evaluation_and_a_save() -> None:
    command = [sys.executable, "-m", "launcher", "train", "--config-file", CONFIG, "--dry-run"]
    subprocess.run(command, cwd=CONFIG.parent, check=True)
