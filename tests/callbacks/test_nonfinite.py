"""A loss or gradient that is not finite stops all ranks at its step, and is told with its rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.scripted import Scripted, words
from tests.system import jobs

PLANT = "LAUNCHER_TEST_PLANT"  # [what, step, rank], as JSON


class Planted(Scripted):
    """Goes wrong at one step of one rank: in its loss, its gradients, or its loss alone."""

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = super().train_step(model, batch)["loss"]
        what, step, rank = json.loads(os.environ[PLANT])
        if self.recorder.step == step and self.run.rank == rank:
            if what == "loss":
                loss = loss * float("nan")
            elif what == "gradient":  # of a root at zero
                loss = loss + (loss - loss.detach()).abs().sqrt()
            elif what == "loss alone":
                loss = loss + torch.tensor(float("inf"))
        return {"loss": loss}


class Phased(Planted):
    """Its second optimiser alone is watched going wrong."""

    def build_optimizer(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        return {
            "first": torch.optim.SGD(model[0].parameters(), 0.01),
            "second": torch.optim.Adam(model[2].parameters(), 0.01),
        }

    def train_step(self, model: nn.Module, batch: Any, phase: str = "") -> dict[str, Any]:
        if phase == "second":
            return super().train_step(model, batch)
        return Scripted.train_step(self, model, batch)


def start(run: Path, kind: str, plant: list[Any], how: str, *more: str) -> jobs.Ended:
    case = ["train", *words(run, kind, [1.0]), "DEBUG.NONFINITE", how, *more]
    with jobs.Group(case, 2, {PLANT: json.dumps(plant)}) as job:
        return job.wait()


@pytest.mark.parametrize(
    ("kind", "plant", "told"),
    [
        ("Planted", ["loss", 7, 1], "step 7: the loss is not finite on rank 1 (micro-batch 1)"),
        jobs.slow(
            "Planted", ["gradient", 5, 1], "step 5: the losses are finite, but their gradients are"
        ),
        jobs.slow("Planted", ["loss alone", 6, 0], "step 6: the loss is not finite on rank 0 (mic"),
        jobs.slow("Phased", ["loss", 7, 1], "step 7: the loss of phase second is not finite on"),
        ("Phased", ["gradient", 7, 0], "step 7: the losses of phase second are finite, but"),
    ],
)
def test_all_ranks_stop_at_that_step(
    kind: str, plant: list[Any], told: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = start(run, f"{__file__}:{kind}", plant, "stop")
    assert ended.code == 1
    failure, step = jobs.failure(run), plant[1]
    assert told in failure["exception"] and failure["step"] == step
    assert f"launcher replay {run} --step {step} --rank" in failure["exception"]
    # What was saved before is whole, and nothing after it is.
    assert max(jobs.checkpoint_steps(run)) == (step - 1) // 2 * 2
    for value in jobs.state(run)["model"].values():
        assert value.isfinite().all()


def test_a_warning_is_given_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = start(run, f"{__file__}:Planted", ["loss alone", 5, 1], "warn").ok()
    lines = [line for line in ended.output.splitlines() if "not finite" in line]
    assert len(lines) == 1 and "step 5: the loss is not finite on rank 1" in lines[0]
    assert jobs.status(run)["state"] == "completed"


def test_what_is_watched_moves_no_weight(tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for run, how in ((plain, ""), (watched, "stop")):
        start(run, f"{__file__}:Planted", ["loss", -1, 0], how, "LOG.EVERY", "3step").ok()
    for name, value in jobs.state(plain)["model"].items():
        assert torch.equal(value, jobs.state(watched)["model"][name])
