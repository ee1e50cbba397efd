"""The scripts of docs/library.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import launcher
from tests.api.scripts import Script
from tests.system import jobs

PAGE = (jobs.ROOT / "docs/library.md").read_text(encoding="utf-8")
SCRIPTS = {name: text for text, name in re.findall(r"```python\n(# (\w+\.py).*?)```", PAGE, re.S)}


@pytest.fixture(autouse=True)
def folder() -> None:
    for name, text in SCRIPTS.items():
        Path(name).write_text(text)
    Path("line.py").write_text(SCRIPTS["train.py"])


def script(*words: str, ranks: int | None = None, kill_at: int = 0) -> jobs.Ended:
    with Script(*words, ranks=ranks, cwd=Path.cwd(), kill_at=kill_at) as job:
        return job.wait()


def what_is_left(run: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The records without their times, and the last checkpoint's weights."""
    records = [{k: v for k, v in r.items() if k != "time"} for r in jobs.metrics(Path(run))]
    return records, launcher.open_run(run).checkpoint().load()["model"]


def test_the_loop_is_of_about_thirty_lines() -> None:
    body = SCRIPTS["loop.py"].partition("\nsettings = ")[2]
    setting_up, training = body.split("\nfor batch in ")
    assert len(setting_up.split("\n")) < 32 and len(training.split("\n")) < 28


# Before the first checkpoint, and between two, where a record is to be taken back.
@pytest.mark.parametrize(("ranks", "kills"), [(None, (7, 18)), (2, (18,))])
def test_the_loop_is_exact_over_kills(ranks: int | None, kills: tuple[int, ...]) -> None:
    script("loop.py", "whole", ranks=ranks).ok()
    for kill_at in kills:
        assert script("loop.py", "killed", ranks=ranks, kill_at=kill_at).code != 0
    script("loop.py", "killed", ranks=ranks).ok()
    (records, weights), (others, theirs) = what_is_left("whole"), what_is_left("killed")
    assert records == others and [one["step"] for one in records] == [*range(5, 41, 5)]
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())


def test_the_loop_is_plain_training() -> None:
    """With one batch an epoch, and nothing drawn, it is what anybody writes in bare torch."""
    text = SCRIPTS["loop.py"].replace("TRAIN.BATCH_SIZE=30", "TRAIN.BATCH_SIZE=200")
    text = text.replace("nn.Dropout(0.1)", "nn.ReLU()").replace("DURATION=6ep", "DURATION=20ep")
    seeded = "nn.init.constant_(model[2].bias, 0.5)\noptimizer = "
    Path("loop.py").write_text(text.replace("optimizer = ", seeded, 1))
    script("loop.py", "run").ok()
    records, weights = what_is_left("run")
    first = launcher.open_run("run").checkpoint(10).load()["model"]
    model = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
    model.load_state_dict(first)
    x = torch.linspace(-1, 1, 200).unsqueeze(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = launcher.open_run("run").checkpoint(10).load()["optimizer"]
    optimizer.load_state_dict(state)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sin())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight)
    assert records[-1]["train/loss"] == pytest.approx(sum(losses[-5:]) / 5)


def test_training_and_reading() -> None:
    ended = script("train.py").ok()
    losses = jobs.values(Path("runs/line"), "val/loss")
    assert ended.out.startswith("completed [") and f"{losses[48]:.4f}"[:5] in ended.out
    told = script("read.py").ok().out.splitlines()
    assert told[0] == "completed 48 0.1" and ("('finish', 48)" in told[1])
    assert str(losses) in told and told[-1] == "{'weight': (1, 1), 'bias': (1,)}"


@pytest.mark.slow
def test_a_cell_with_ranks() -> None:
    script("notebook.py").ok()
    assert jobs.status(Path("runs/line-2"))["state"] == "completed"
    assert len(jobs.environment(Path("runs/line-2"))["ranks"]) == 2


@pytest.mark.slow
def test_the_loop_under_torchrun() -> None:
    jobs.Job(
        [*jobs.TORCHRUN, "--standalone", "--nproc-per-node=2", "loop.py", "whole"], cwd=Path.cwd()
    ).wait().ok()
    script("loop.py", "forked", ranks=2).ok()
    assert what_is_left("whole")[0] == what_is_left("forked")[0]
