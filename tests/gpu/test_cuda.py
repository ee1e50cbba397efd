"""What only a GPU can show: `make test-gpu`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.helpers import ALONE, Regression, Trainer
from tests.system import jobs
from tests.system.exact import COMMON, assert_same

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
TASK = Path(__file__).with_name("cuda_task.py")
ON_CUDA = ("DIST.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", "1")


def test_a_rank_has_its_device_and_nccl(tmp_path: Path) -> None:
    """Under torchrun, with one rank; and it learns."""
    run = tmp_path / "run"
    words = ("--config-file", jobs.DIGITS, *ON_CUDA, "OUTPUT_DIR", run, "TRAIN.DURATION", "5ep")
    jobs.train(*words, ranks=1, cold=True).ok()
    about = json.dumps(json.loads((run / "environment.json").read_text()))
    assert torch.cuda.get_device_name(0) in about and "nccl" in about
    assert list(jobs.values(run, "val/accuracy").values())[-1] > 0.9
    assert min(jobs.values(run, "system/gpu_mem_gib").values()) > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_killed_run_resumes_exactly(precision: str, tmp_path: Path) -> None:
    """Dropout's random states on the device, the scaler of fp16, and weights that went on changing
    while a checkpoint was copied beside them."""
    words = [*COMMON, *ON_CUDA, "DETERMINISTIC", "True", "TRAIN.PRECISION", precision]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    jobs.train(*words, "OUTPUT_DIR", whole, cold=True).ok()
    with jobs.start(*words, "OUTPUT_DIR", broken, cold=True) as job:
        jobs.wait_for_save(broken, 8, job)
        job.kill()
    jobs.train(*words, "--resume", "OUTPUT_DIR", broken, cold=True).ok()
    assert_same(broken, whole)
    ours, theirs = (jobs.state(run)["ranks"][0]["random"]["cuda"] for run in (broken, whole))
    assert torch.equal(ours, theirs)


class OnDevice(Regression):
    def __init__(self, weighted: bool) -> None:
        super().__init__(weighted)
        self.x, self.y, self.w = (t.to(CUDA) for t in (self.x, self.y, self.w))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        self.recorder.scalar("tokens", 17)
        self.recorder.scalar("gate", batch[0].mean(), weight=3)
        return super().train_step(model, batch)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_step_waits_for_the_device(weighted: bool) -> None:
    """Any host-device sync raises in these."""
    words = ("MODEL.EMA_DECAY", 0.9, "TRAIN.GRAD_CLIP", 1.0)
    trainer = Trainer(OnDevice(weighted), *words, runtime=replace(ALONE, device=CUDA), micro=3)
    trainer.run(12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.recorded()


@pytest.mark.parametrize("ranks", [None, 1])
def test_no_step_of_a_whole_run_waits(ranks: int | None, tmp_path: Path) -> None:
    """With the loader, pinned memory, the copy on a stream of its own, the guard and, of one rank
    under torchrun, DDP over NCCL: the task has syncs raise from step 20 to 39, between records.
    Each batch arrives as it was made."""
    words = ["TASK.NAME", f"{TASK}:Strict", *ON_CUDA, "OUTPUT_DIR", tmp_path / "run"]
    words += ["LOG.EVERY", "50step", "TRAIN.DURATION", "60step", "EVAL.EVERY", ""]
    jobs.train(*words, "CHECKPOINT.EVERY", "", ranks=ranks, cold=True).ok()
    assert list(jobs.values(tmp_path / "run", "train/wrong").values()) == [0, 0]


def test_too_little_memory_names_the_key_to_change(tmp_path: Path) -> None:
    words = ["TASK.NAME", f"{TASK}:Huge", *ON_CUDA, "OUTPUT_DIR", tmp_path / "run"]
    ended = jobs.train(*words, "TRAIN.BATCH_SIZE", "16", cold=True)
    assert ended.code == 1 and "TRAIN.MICRO_BATCH_SIZE 8" in ended.err
