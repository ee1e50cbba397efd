"""What can be tried in seconds, before a run of hours. Run it with: pytest"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from text import Windows
from torch import nn
from torch.utils.data import default_collate

from launcher.config import load_config
from launcher.tasks import resolve_task

CONFIG = Path(__file__).with_name("text.yaml")


def make(*overrides: str) -> Any:
    """The task, with its config, outside a run."""
    config = load_config(str(CONFIG), overrides, resolve_task)
    assert config.task is not None
    return config.task(config.cfg)


def test_windows_follow_each_other_in_an_evaluation() -> None:
    data = Windows(b"abcdefghi", length=4, count=2, random=False)
    read = [tuple(bytes(part.tolist()) for part in data[i]) for i in range(2)]
    assert read == [(b"abcd", b"bcde"), (b"efgh", b"fghi")]


def test_what_is_held_out_is_not_trained_on() -> None:
    task = make()
    held_out, text = task.build_dataset("val").text, task.build_dataset("train").text
    assert bytes(held_out[1:].tolist()) not in bytes(text.tolist())


def test_no_byte_sees_those_that_follow() -> None:
    model = make().build_model().eval()
    window = torch.randint(256, (1, 64))
    changed = window.clone()
    changed[0, 40:] = 7
    before, after = model(window), model(changed)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40:], after[0, 40:])


def test_the_perplexity_of_a_model_that_knows_nothing() -> None:
    class Nothing(nn.Module):
        def forward(self, window: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*window.shape, 256)

    task = make()
    data = task.build_dataset("val")
    outputs = task.eval_step(Nothing(), default_collate([data[i] for i in range(8)]))
    assert outputs["loss"].shape == (8,)
    assert math.isclose(task.summarize(outputs)["perplexity"], 256, rel_tol=1e-5)


def test_it_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    task = make("TASK.LENGTH", "16")
    model, data = task.build_model(), task.build_dataset("val")
    batch = default_collate([data[i] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.train_step(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_a_step_an_evaluation_and_a_save() -> None:
    command = [sys.executable, "-m", "launcher", "train", "--config-file", CONFIG, "--dry-run"]
    subprocess.run(command, cwd=CONFIG.parent, check=True)
