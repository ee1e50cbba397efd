"""`launcher.train` in the caller's own process."""

from __future__ import annotations

import gc
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.backends import cudnn

import launcher
from launcher import CfgNode
from launcher.errors import RunError, UsageError
from tests.api.line import Line, X, Y
from tests.system import jobs
from tests.system.exact import records
from tests.waiting import wait_until

# Whole batches, so that a loop by hand needs no order.
CONFIG: dict[str, Any] = {
    "OUTPUT_DIR": "run",
    "DIST.DEVICE": "cpu",
    "TRAIN": {"BATCH_SIZE": len(X), "DURATION": "12step"},
    "OPTIM": {"LR": np.float64(0.05), "MOMENTUM": 0.9},
    "LOG.EVERY": "2step",
    "LOG.TENSORBOARD": False,
    "EVAL.EVERY": "4step",
    "CHECKPOINT.EVERY": "4step",
}


def by_hand(steps: int, scale: float = 1.0) -> nn.Linear:
    """The same training in bare torch."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, -0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), scale * Y).backward()
        optimizer.step()
    return model


def weights(run: Any) -> dict[str, torch.Tensor]:
    return run.checkpoint().load()["model"]


def assert_trained(run: Any, model: nn.Linear) -> None:
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, model.state_dict()[name])


@pytest.mark.parametrize("form", ["dict", "node", "file"])
def test_a_config_in_each_form(form: str) -> None:
    config: Any = CONFIG
    if form == "node":
        config = CfgNode({**CONFIG, "OPTIM": {"LR": 0.05, "MOMENTUM": 0.9}})
    if form == "file":
        Path("mine.yaml").write_text("TRAIN: {BATCH_SIZE: 24, DURATION: 3step}\nDIST.DEVICE: cpu\n")
        config = Path("mine.yaml")
    overrides = {**CONFIG, "TASK.SCALE": torch.tensor(2.0)} if form == "file" else {"TASK.SCALE": 2}
    run = launcher.train(config, Line, overrides=overrides)
    assert run.status is not None and run.status.state == "completed"
    if form == "file":  # where `launcher replay` looks for it
        assert run.environment["command"][1:4] == ["launcher.train", "--config-file", "mine.yaml"]
    assert run.config["OPTIM.LR"] == 0.05 and run.config["TASK.SCALE"] == 2.0
    assert_trained(run, by_hand(12, 2.0))


def test_the_same_as_the_command_line_by_the_name_that_is_recorded(tmp_path: Path) -> None:
    config = {**CONFIG, "TRAIN": {"BATCH_SIZE": 5, "DURATION": "12step"}, "SEED": 7}
    ours = launcher.train(config, Line)
    jobs.train("--config-file", tmp_path / "run/config.yaml", "OUTPUT_DIR", tmp_path / "cli").ok()
    assert records(tmp_path / "run") == records(tmp_path / "cli")
    theirs = weights(launcher.open_run("cli"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights(ours).items())


def everything() -> dict[str, Any]:
    """What a run changes in its process."""
    numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    log = logging.getLogger("launcher")
    return {
        "handlers": {number: signal.getsignal(number) for number in numbers},
        "wakeup": wakeup,
        "logging": (logging.Logger.callHandlers, logging.Handler.handle, logging.basicConfig),
        "loggers": (logging.root.handlers[:], logging.root.level, log.level, log.handlers[:]),
        "task's logger": logging.getLogger("tests").level,
        "warnings": (warnings.showwarning, warnings.filters[:]),
        "hook": threading.excepthook,
        "gc": (gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "threads": (torch.get_num_threads(), sorted(t.name for t in threading.enumerate())),
        "group": torch.distributed.is_initialized(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_anomaly_enabled(),
        ),
        "precision": (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark),
        "environment": dict(os.environ),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "folder": os.getcwd(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def unusual() -> Any:
    """A process that is set up in its own way: nothing is what a run would set, or leave."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    cudnn.benchmark, threads = True, torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(123)
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gc.enable()
    torch.set_num_threads(threads)
    cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unusual")
@pytest.mark.parametrize(
    ("do", "error"),
    [("", None), ("step fail", ZeroDivisionError), ("step int", None), ("empty", UsageError)],
)
def test_the_process_is_left_as_it_was(do: str, error: Any) -> None:
    switches = {"DETERMINISTIC": True, "TRAIN.PRECISION": "tf32", "DEBUG.DETECT_ANOMALY": True}
    workers = {"DATALOADER.NUM_WORKERS": 1} if not do else {}
    overrides = {**switches, **workers, "TASK.DO": do, "TASK.AT": 5, "LOG.LEVEL": "DEBUG"}
    before = everything()
    try:
        run = launcher.train(CONFIG, Line, overrides=overrides)
        assert run.status is not None and not error
        assert run.status.state == ("stopped" if do else "completed")
    except BaseException as caught:
        assert error is not None and type(caught) is error, caught
    # The threads of queues end soon after their queues.
    wait_until(lambda: threading.active_count() <= len(before["threads"][1]), 30, "no more threads")
    after = everything()
    for name, found in before.items():
        assert after[name] == found, name


def test_what_a_run_fails_with_is_raised_and_told_of() -> None:
    with pytest.raises(ZeroDivisionError, match="by hand"):
        launcher.train(CONFIG, Line, overrides={"TASK.DO": "step fail", "TASK.AT": 6})
    run = launcher.open_run("run")
    assert run.status is not None and run.status.state == "failed"
    assert run.failure["exception"] == "ZeroDivisionError: by hand"
    assert launcher.train(CONFIG, Line, resume=True, allow="TASK.DO,TASK.AT").failure == {}
    assert_trained(run, by_hand(12))


@pytest.mark.parametrize(
    ("overrides", "how", "told"),
    [
        ({"OPTIM.LRR": 1, "SEED": 0.5}, {}, r"2 mistakes.*\n  launcher.train  OPTIM.LRR: unknown"),
        ({"SEED": object()}, {}, "SEED is a object, which is no value"),
        ({"SEED": None}, {}, "null is not a value"),
        ({3: 1}, {}, "3 is no key"),
        ({}, {"task": None}, "TASK.NAME: is empty"),
        ({}, {"task": "digits"}, "task is 'digits': give the class"),
        ({}, {"task": dict}, "is no task: it lacks build_model"),
        ({}, {"resume": True, "overwrite": True}, "give one of them"),
        ({"DEBUG.BREAK_RANK": 1}, {}, "the last rank is 0"),
        ({"TASK.DO": "empty"}, {}, "empty data set"),
        ({}, {"ranks": 0}, "at least one"),
    ],
)
def test_mistakes_are_usage_errors(overrides: Any, how: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        launcher.train(CONFIG, **{"task": Line, **how}, overrides=overrides)
    assert not Path("run").exists()


def test_a_directory_that_holds_a_run_is_refused_and_free_for_the_next() -> None:
    first = launcher.train(CONFIG, Line).status
    claim = "from launcher.telemetry.rundir import RunDirectory as R; R('run').claim()"
    subprocess.run([sys.executable, "-c", claim], check=True)  # while this process lives
    with pytest.raises(UsageError, match="already holds a run"):
        launcher.train(CONFIG, Line)
    assert launcher.train(CONFIG, Line, overwrite=True).status != first
    assert len(list(Path().glob("run.old-*"))) == 1
    more = {"TRAIN.DURATION": "15step"}
    run = launcher.train(CONFIG, Line, overrides=more, resume=True, allow=["TRAIN.DURATION"])
    assert_trained(run, by_hand(15))


def test_an_interrupt_stops_after_the_step_and_returns(tmp_path: Path) -> None:
    asked = {"TASK.DO": "step int", "TASK.AT": 6}
    run = launcher.train(CONFIG, Line, overrides=asked)
    assert run.status is not None
    assert (run.status.state, run.status.reason) == ("stopped", "SIGINT")
    assert 6 <= run.status.step < 12 and run.checkpoint().step == run.status.step
    assert_trained(run, by_hand(run.status.step))
    # It is asked at step 6 alone, which is done.
    assert_trained(launcher.train(CONFIG, Line, overrides=asked, resume=True), by_hand(12))


def test_an_interrupt_before_the_first_step(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt, match="before the first step"):
        launcher.train(CONFIG, Line, overrides={"TASK.DO": "build int"})
    assert not Path("run").exists()
    assert "failed" not in capfd.readouterr().err
    assert_trained(launcher.train(CONFIG, Line), by_hand(12))


def test_sigterm_is_handed_on_when_the_run_is_saved() -> None:
    seen: list[str] = []

    def handler(*_: object) -> None:
        seen.append(jobs.status(Path("run"))["state"])

    before = signal.signal(signal.SIGTERM, handler)
    try:
        run = launcher.train(CONFIG, Line, overrides={"TASK.DO": "step term", "TASK.AT": 6})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["stopped"] and run.checkpoint().step == run.status.step  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_second_interrupt_ends_the_run_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        launcher.train(CONFIG, Line, overrides={"TASK.DO": "step int twice", "TASK.AT": 6})
    assert jobs.status(Path("run"))["state"] == "failed"
    assert_trained(
        launcher.train(CONFIG, Line, resume=True, allow=["TASK.DO", "TASK.AT"]), by_hand(12)
    )


@pytest.mark.slow
def test_a_hang_ends_the_run_and_not_the_process() -> None:
    hang = {"TASK.DO": "step hang", "TASK.AT": 6, "DIST.TRAIN_TIMEOUT": "1s"}
    with pytest.raises(RunError, match="hang: nothing has moved"):
        launcher.train(CONFIG, Line, overrides=hang)
    assert jobs.status(Path("run"))["state"] == "failed"
    assert "guard" not in [thread.name for thread in threading.enumerate()]


def test_where_it_cannot_be_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        with pytest.raises(UsageError, match="give ranks=1") as error:
            launcher.train(CONFIG, Line)
        caught.append(error.value)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert caught
    monkeypatch.setattr(torch.distributed, "is_initialized", Mock(return_value=True))
    with pytest.raises(UsageError, match="destroy_process_group"):
        launcher.train(CONFIG, Line)
    assert not Path("run").exists()


ANSWERS = """
import sys, launcher
from launcher.errors import UsageError
assert not {"torch", "numpy"} & set(sys.modules), "import launcher"
try:
    launcher.train({"TASK.NAME": "digits", "OPTIM.LRR": 1})
except UsageError as error:
    print(error)
launcher.open_run("run").columns()
assert "torch" not in sys.modules
try:
    launcher.trian
except AttributeError as error:
    print(error)
"""


def test_without_torch(tmp_path: Path) -> None:
    launcher.train(CONFIG, Line)
    ended = subprocess.run(
        [sys.executable, "-c", ANSWERS], capture_output=True, text=True, env=os.environ
    )
    assert ended.returncode == 0, ended.stderr
    assert "OPTIM.LRR: unknown key" in ended.stdout and "no attribute 'trian'" in ended.stdout
