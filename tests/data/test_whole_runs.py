"""Whole runs over data sets that go by the epoch: broken off in the middle of one, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.cli import main
from tests.data import tasks
from tests.system import jobs
from tests.system.exact import records

STEPS = -(-tasks.LENGTH // 4)  # an epoch
COMMON = (
    *("TASK.NAME", f"{tasks.__file__}:Data", "TRAIN.BATCH_SIZE", "4", "TRAIN.DURATION", "3ep"),
    *("CHECKPOINT.EVERY", "4step", "LOG.EVERY", "1step", "EVAL.EVERY", "3step"),
    *("EVAL.BATCH_SIZE", "8", "LOG.TENSORBOARD", "False"),
)


@pytest.fixture(params=[(), ("TASK.SHARED", "True")], ids=["own", "shared"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A run that was never interrupted, without workers."""
    run, words = tmp_path / "whole", (*COMMON, *request.param)
    assert main(["train", *words, "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(run)]) == 0
    return run, words


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_is_told_where_it_is_read_also_after_a_resume_in_its_middle(
    whole: tuple[Path, tuple[str, ...]],
    workers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, words = whole
    run = tmp_path / "run"
    command = ["train", *words, "DATALOADER.NUM_WORKERS", workers, "OUTPUT_DIR", str(run)]
    monkeypatch.setenv(tasks.FAIL_AT, "11")  # the checkpoint is of step 8; an epoch has 6 steps
    assert main(command) == 1
    monkeypatch.delenv(tasks.FAIL_AT)
    assert main([*command, "--resume"]) == 0
    assert records(run) == records(reference)
    for name, tensor in jobs.state(reference)["model"].items():
        assert torch.equal(jobs.state(run)["model"][name], tensor)
    told = jobs.values(run, "train/told")
    assert told == {step: (step - 1) // STEPS for step in range(1, 3 * STEPS + 1)}
    assert set(jobs.values(run, "val/told").values()) == {0}
    assert len(set(jobs.values(run, "train/noise").values())) >= 3
