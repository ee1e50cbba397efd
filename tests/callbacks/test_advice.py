"""What the launcher's own callbacks warn of: data, the disk, a stop that takes too long."""

import os
import shutil
import subprocess
from types import SimpleNamespace

import psutil
import pytest
from torch import nn

from launcher.callbacks.data_advice import DataAdvice
from launcher.callbacks.disk_space import DiskSpace
from launcher.callbacks.shutdown_advice import ShutdownAdvice, shutdown_timeout
from tests.callbacks.helpers import view
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("waits", "steps", "warned"), [(0.075, 4, False), (0.125, 4, True), (0.125, 1, False)]
)
def test_a_run_that_waits_for_data_is_told_once(
    waits: float, steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """More than a fifth of a second or more, with the numbers, one line."""
    run = view()
    run.progress.step = 100
    advice = DataAdvice(run)
    advice.on_start()
    for _ in range(2):
        run.progress.step += steps
        advice.on_record({"perf/data_s": waits, "perf/step_s": 0.5})
        advice.on_record(None)  # another rank
    told = "25 % of its time (perf/data_s 0.1250 of perf/step_s 0.5000; the reason)"
    assert [told in message for message in caplog.messages] == [True] * warned


@pytest.mark.parametrize(("room", "warned"), [(3, True), (5, False)])
def test_a_disk_too_small_for_the_checkpoints_is_told(
    room: int, warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KEEP_LAST 2, KEEP_BEST 1 and the one being written are four."""
    one = 2 * 4 * 110  # weights and momentum, four bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room * one))
    DiskSpace(view(model=nn.Linear(10, 10))).on_start()
    assert bool(caplog.records) == warned


def test_a_save_that_does_not_fit_what_torchrun_grants_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    advice = ShutdownAdvice(view())
    assert advice.granted_s == 30
    advice.on_start()
    for seconds in (20.0, 40.0, 41.0):
        advice.on_saved(seconds)
    (told,) = caplog.messages
    assert "torchrun kills its ranks 30 s after" in told and "--shutdown-timeout=80" in told


@pytest.mark.parametrize(
    ("arguments", "env", "seconds"),
    [
        ([], {}, 30),
        ([], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90),
        (["--shutdown-timeout=120"], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 120),
        (["--shutdown_timeout", "45"], {}, 45),
    ],
)
def test_what_torchrun_grants(
    arguments: list[str], env: dict[str, str], seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from its command line, which a rank sees as its parent's."""
    command = ["sh", "-c", "read line", "torchrun", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        wait_until(lambda: psutil.Process(parent.pid).cmdline() == command)
        assert shutdown_timeout(env) == seconds
