"""When a stop must begin, and whether it fits what torchrun grants."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from launcher.engine.stopping import SLURM_SPARE_S, StopMargin, deadlines
from launcher.runtime.cpu import cpu_budget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from tests.engine.helpers import config


def made(launched_by: str) -> StopMargin:
    topology = Topology(launched_by=launched_by)
    return StopMargin(Runtime(topology, torch.device("cpu"), cpu_budget(1)), Progress())


def test_the_margin_is_the_longest_save_and_two_steps() -> None:
    progress = Progress()
    margin = StopMargin(Runtime(Topology(), torch.device("cpu"), cpu_budget(1)), progress)
    margin.saved(50.0)
    margin.saved(20.0)
    margin.began, progress.step = time.monotonic() - 100, 10
    assert margin() == pytest.approx(50 + 2 * 10, abs=1)


def test_a_save_that_does_not_fit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    margin = made("torchrun")
    margin.saved(20.0)
    assert not caplog.records
    margin.saved(40.0)
    margin.saved(41.0)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "torchrun kills its ranks 30 s after" in record.getMessage()
    assert "--shutdown-timeout=80" in record.getMessage()


def test_srun_and_a_lone_process_have_no_such_limit(caplog: pytest.LogCaptureFixture) -> None:
    for by in ("srun", "python"):
        made(by).saved(1000.0)
    assert not caplog.records


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    found = deadlines(config("TRAIN.MAX_TIME", "1h"))
    left = {name: at - time.monotonic() for name, at in found.items()}
    assert left["Slurm's time limit"] == pytest.approx(600 - SLURM_SPARE_S, abs=5)
    assert 0 < left["TRAIN.MAX_TIME 1h"] <= 3600  # counted from the process's begin
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert deadlines(config()) == {}
