"""TRAIN.MICRO_BATCH_SIZE auto: what has no room is taken again in smaller parts, and nothing else
changes. Running out of memory is planted: a forward pass of more samples than there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config import CfgNode
from tests.edges.test_zoo import same
from tests.system import jobs
from tests.system.exact import records
from tests.system.exact_task import Exact


class Tight(Exact):
    """Room for `ROOM` samples on rank `AT`, from step `FROM` on; the pass fails after it has moved
    buffers, drawn numbers and recorded, in the backward pass where `LATE`."""

    @classmethod
    def defaults(cls) -> CfgNode:
        more = {"ROOM": 3, "AT": 0, "FROM": 0, "LATE": False, "GATHERS": False}
        return CfgNode({**Exact.defaults(), **more})

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        keys = self.cfg.TASK
        if keys.GATHERS:
            self.gather(batch[0])
        self.recorder.scalar("samples", len(batch[0]))
        found = super().train_step(model, batch)
        here = self.run.rank == keys.AT and self.run.progress.step >= keys.FROM
        if here and len(batch[0]) > keys.ROOM:
            if not keys.LATE:
                raise torch.OutOfMemoryError("no room for so many")
            found["loss"] = Full.apply(found["loss"])
        return found


class Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("no room for the gradients")


class Phased(Tight):
    def build_optimizer(self, model: nn.Module) -> Any:
        return {"all": torch.optim.SGD(model.parameters(), 0.1)}

    def train_step(self, model: nn.Module, batch: Any, phase: str = "") -> Any:
        return super().train_step(model, batch)


def words(run: Path, *more: object, task: str = "Tight") -> list[object]:
    place = ("TASK.NAME", f"{__file__}:{task}", "OUTPUT_DIR", run, "DATALOADER.NUM_WORKERS", 0)
    sizes = ("TRAIN.BATCH_SIZE", 10, "TRAIN.DURATION", "2ep", "TASK.WIDTH", 32, "TASK.SAMPLES", 24)
    rest = ("LOG.EVERY", "1step", "LOG.DIGEST", "1step", "EVAL.EVERY", "", "OPTIM.LR", 0.05)
    return [*place, *sizes, *rest, "CHECKPOINT.EVERY", "2step", *more]


AUTO = ("TRAIN.MICRO_BATCH_SIZE", "auto")
# A share of ten or five samples halves to this.
CUT = {1: 3, 2: 3}


@pytest.mark.parametrize(
    ("ranks", "late"), [(1, False), jobs.slow(1, True), jobs.slow(2, False), (2, True)]
)
def test_it_is_the_run_that_began_so(ranks: int, late: bool, tmp_path: Path) -> None:
    """To the last bit, with one process: weights, buffers, dropout, augmentation and records, the
    failed attempt's numbers not among them. With two gradients cross in a round of their own."""
    how: dict[str, Any] = {"ranks": ranks} if ranks > 1 else {}
    tight = ("TASK.LATE", late, "TASK.AT", ranks - 1)
    ended = jobs.train(*words(tmp_path / "auto", *AUTO, *tight), **how).ok()
    halved = [f"of {size} samples: {half}" for size, half in ((10, 5), (5, 3))][ranks - 1 :]
    assert all(ended.err.count(f"no room for micro-batches {told}") == 1 for told in halved)
    plain = ("TRAIN.MICRO_BATCH_SIZE", CUT[ranks], "TASK.ROOM", 99)
    jobs.train(*words(tmp_path / "plain", *plain), **how).ok()
    ours, theirs = records(tmp_path / "auto"), records(tmp_path / "plain")
    assert jobs.state(tmp_path / "auto")["micro_batch_size"] == CUT[ranks]
    if ranks == 1:
        assert ours == theirs
        assert same(jobs.state(tmp_path / "auto")["model"], jobs.state(tmp_path / "plain")["model"])
        return
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"digest"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_where_all_fits_nothing_is_cut(tmp_path: Path) -> None:
    jobs.train(*words(tmp_path / "auto", *AUTO, "TASK.ROOM", 99)).ok()
    jobs.train(*words(tmp_path / "plain", "TASK.ROOM", 99)).ok()
    assert records(tmp_path / "auto") == records(tmp_path / "plain")
    assert jobs.state(tmp_path / "auto")["micro_batch_size"] == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_what_it_found(ranks: int, tmp_path: Path) -> None:
    """Memory that is short from step 3 on, and a resume that never sees it short: the same bits."""
    how: dict[str, Any] = {"ranks": ranks} if ranks > 1 else {}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    jobs.train(*words(whole, *AUTO, "TASK.FROM", 3), **how).ok()
    with jobs.start(*words(broken, *AUTO, "TASK.FROM", 3), **how) as job:
        jobs.wait_for_save(broken, 4, job)
        job.kill()
    again = (*AUTO, "TASK.FROM", 99, "--resume", "--allow", "TASK.FROM")
    jobs.train(*words(broken, *again), **how).ok()
    assert records(broken) == records(whole)
    assert same(jobs.state(broken)["model"], jobs.state(whole)["model"])


@pytest.mark.parametrize(
    ("more", "ranks", "told"),
    [
        (("TASK.ROOM", 0), None, "Not one sample has room"),
        (("TASK.NAME", f"{__file__}:Phased"), None, "which does not go with phases"),
        (("TASK.GATHERS", True), 2, "which does not go with self.gather"),
        (("TRAIN.MICRO_BATCH_SIZE", "all"), None, "TRAIN.MICRO_BATCH_SIZE"),
    ],
)
def test_what_cannot_be_is_told(
    more: tuple[object, ...], ranks: int | None, told: str, tmp_path: Path
) -> None:
    ended = jobs.train(*words(tmp_path / "run", *AUTO, *more), ranks=ranks, timeout=60)
    assert ended.code != 0 and told in ended.err
