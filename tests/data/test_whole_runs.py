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


def assert_resumed_exactly(
    run: Path, words: tuple[str, ...], workers: str, reference: Path, patch: pytest.MonkeyPatch
) -> None:
    """Break a run off in the middle of an epoch and resume it there."""
    command = ["train", *words, "DATALOADER.NUM_WORKERS", workers, "OUTPUT_DIR", str(run)]
    patch.setenv(tasks.FAIL_AT, "11")  # the checkpoint is of step 8; an epoch has 6 steps
    assert main(command) == 1
    patch.delenv(tasks.FAIL_AT)
    assert main([*command, "--resume"]) == 0
    assert records(run) == records(reference)
    for name, tensor in jobs.state(reference)["model"].items():
        assert torch.equal(jobs.state(run)["model"][name], tensor)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_is_told_where_it_is_read_also_after_a_resume_in_its_middle(
    whole: tuple[Path, tuple[str, ...]],
    workers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, words = whole
    run = tmp_path / "run"
    assert_resumed_exactly(run, words, workers, reference, monkeypatch)
    told = jobs.values(run, "train/told")
    assert told == {step: (step - 1) // STEPS for step in range(1, 3 * STEPS + 1)}
    assert set(jobs.values(run, "val/told").values()) == {0}
    assert len(set(jobs.values(run, "train/noise").values())) >= 3


def test_a_mixture_goes_on_exactly_with_its_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sources are told their passes, which begin within the epochs."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = (*COMMON, "TASK.MIXED", "True", "TRAIN.SAMPLER", "sequential")
    assert main(["train", *words, "DATALOADER.NUM_WORKERS", "2", "OUTPUT_DIR", str(whole)]) == 0
    assert_resumed_exactly(run, words, "0", whole, monkeypatch)
    mixture, means = tasks.mixed(), []
    for step in range(3 * STEPS):
        epoch, k = divmod(step, STEPS)
        mixture.set_epoch(epoch)
        samples = [mixture[i] for i in range(4 * k, min(4 * k + 4, tasks.LENGTH))]
        means.append([torch.stack(samples)[:, column].mean().item() for column in (0, 1)])
    found = (jobs.values(run, f"train/{name}").values() for name in ("index", "told"))
    assert [*zip(*found, strict=True)] == [tuple(mean) for mean in means]
