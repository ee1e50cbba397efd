"""What the launcher's own callbacks warn of: data, the disk, a stop that takes too long."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from launcher.callbacks.data_advice import DataAdvice
from launcher.callbacks.disk_space import DiskSpace
from launcher.callbacks.shutdown_advice import ShutdownAdvice
from launcher.config import defaults
from launcher.runtime.progress import Progress
from tests.callbacks.helpers import view


@pytest.mark.parametrize(
    ("waits", "steps", "warned"), [(0.075, 4, False), (0.125, 4, True), (0.125, 1, False)]
)
def test_a_run_that_waits_for_data_is_told_once(
    waits: float, steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """More than a fifth of a second or more, with the numbers, one line."""
    caplog.set_level(logging.WARNING, "launcher")
    run: Any = SimpleNamespace(
        progress=Progress(step=100), data=SimpleNamespace(size=SimpleNamespace(reason="R"))
    )
    advice = DataAdvice(run)
    advice.on_start()
    for _ in range(2):
        run.progress.step += steps
        advice.on_record({"perf/data_s": waits, "perf/step_s": 0.5})
        advice.on_record(None)  # another rank
    assert len(caplog.messages) == int(warned)
    if warned:
        assert "25 %" in caplog.text and "0.1250 of perf/step_s 0.5000; R" in caplog.text


@pytest.mark.parametrize(("room", "warned"), [(3, True), (5, False)])
def test_a_disk_too_small_for_the_checkpoints_is_told(
    room: int,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KEEP_LAST 2, KEEP_BEST 1 and the one being written are four."""
    caplog.set_level(logging.WARNING, "launcher")
    one = 2 * 4 * 110  # weights and momentum, four bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room * one))
    run: Any = SimpleNamespace(
        cfg=defaults(), model=nn.Linear(10, 10), directory=tmp_path, runtime=SimpleNamespace(rank=0)
    )
    DiskSpace(run).on_start()
    assert bool(caplog.records) == warned


def test_a_save_that_does_not_fit_what_torchrun_grants_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "launcher")
    advice = ShutdownAdvice(view())
    assert advice.granted_s == 30
    advice.on_start()
    for seconds in (20.0, 40.0, 41.0):
        advice.on_saved(seconds)
    assert len(caplog.messages) == 1
    assert "torchrun kills its ranks 30 s after" in caplog.text
    assert "--shutdown-timeout=80" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "env", "seconds"),
    [
        ([], {}, 30),
        ([], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90),
        (["--shutdown-timeout=120"], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 120),
        (["--shutdown_timeout", "45"], {}, 45),
    ],
)
def test_what_torchrun_grants(arguments: list[str], env: dict[str, str], seconds: int) -> None:
    """Read from its command line, which a rank sees as its parent's."""
    child = f"from launcher.callbacks import shutdown_advice as a; print(a.shutdown_timeout({env}))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(found.stdout) == seconds
