"""Ways to start a run, and short runs in other settings: a terminal, mixed precision."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.system.jobs import (
    TASKS,
    TRAIN,
    Forked,
    Job,
    clean_environment,
    event_scalars,
    expected_scalars,
    metrics,
    slow,
    slurm_job,
    state,
    status,
    train,
    values,
)
from tests.waiting import wait_until


def noted(run: Path, *more: Any) -> list[Any]:
    return ["TASK.NAME", f"{TASKS}:Noted", "OUTPUT_DIR", run, "LOG.EVERY", "1step", *more]


def test_a_batch_script_without_srun_is_one_process(tmp_path: Path) -> None:
    """Inside a Slurm job but not in an srun step nobody else was started: one process."""
    run = tmp_path / "run"
    env = {"SLURM_JOB_ID": slurm_job(), "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    train(*noted(run, "TRAIN.DURATION", "1step"), env=env).ok()
    assert status(run)["state"] == "completed"


@pytest.mark.parametrize("precision, ranks", [("bf16", None), ("fp16", 2), slow("tf32", 2)])
def test_precision(tmp_path: Path, precision: str, ranks: int | None) -> None:
    """Item 6: mixed precision trains to the end with finite losses; weights stay fp32."""
    run = tmp_path / "run"
    words = ["TRAIN.PRECISION", precision, "TRAIN.DURATION", "4ep", "TRAIN.BATCH_SIZE", 16]
    words += ["OPTIM.LR", 0.02, "TRAIN.MICRO_BATCH_SIZE", 4, "MODEL.EMA_DECAY", 0.9]
    train(*noted(run, *words), ranks=ranks).ok()
    losses = values(run, "train/loss")
    assert losses and all(math.isfinite(loss) for loss in losses.values())
    assert status(run)["state"] == "completed"
    trained = values(run, "val/trained")
    assert trained[max(trained)] < trained[min(trained)]
    # The scale begins at 65536 here; a few steps are skipped until the gradients fit.
    assert status(run)["step"] >= 8 and status(run)["epoch"] == 4
    saved = state(run)
    assert {str(tensor.dtype) for tensor in saved["model"].values()} == {"torch.float32"}
    assert bool(saved["scaler"]) == (precision == "fp16")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    """Contract, section 5: NaN becomes null, its key is listed, and the JSON stays strict."""
    run = tmp_path / "run"
    train(*noted(run, "TASK.NAN", True, "TRAIN.BATCH_SIZE", 35, "TRAIN.DURATION", "4step")).ok()
    records = [record for record in metrics(run) if "train/odd" in record]
    assert [record["train/odd"] for record in records] == [None, 1.0, None, 1.0]
    assert [record.get("nonfinite") for record in records] == [["train/odd"], None] * 2
    found, expected = (sorted(f(run).items()) for f in (event_scalars, expected_scalars))
    assert repr(found) == repr(expected)  # NaN is not equal to itself


def test_the_module_and_the_default_run_directory(tmp_path: Path) -> None:
    """Contract, section 1: `python -m launcher train` is the same; runs/<config file's stem>."""
    (tmp_path / "mine.yaml").write_text(
        f"TASK:\n  NAME: {TASKS}:Noted\nTRAIN:\n  DURATION: 1step\nLOG:\n  TENSORBOARD: false\n"
    )
    command = [sys.executable, "-m", "launcher", "train", "--config-file", "mine.yaml"]
    with Job(command, cwd=tmp_path) as job:
        job.wait().ok()
    assert status(tmp_path / "runs/mine")["state"] == "completed"
    assert not (tmp_path / "runs/mine/tensorboard").exists()


OWN = """\
from {imports} import FACTOR
from launcher.tasks.sine import Sine

class Mine(Sine):
    def train_step(self, model, batch):
        values = super().train_step(model, batch)
        return {{"loss": FACTOR * values["loss"]}}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Somebody's own, with tasks that import what lies beside them and what lies at its root."""
    for name in ("tasks/near", "nets/deep", "pack/near", "pack/__init__"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("FACTOR = 2.0\n")
    for name, imports in {
        "tasks/beside": "near",
        "tasks/rooted": "nets.deep",
        "pack/relative": ".near",
        "pack/absolute": "pack.near",
    }.items():
        (tmp_path / f"{name}.py").write_text(OWN.format(imports=imports))
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *("tasks/rooted.py", "pack/relative.py", "pack.absolute"),
        *map(slow, ("tasks/beside.py", "pack/absolute.py", "tasks.rooted")),
    ],
)
def test_the_layout_of_somebodys_own_repository(name: str, repository: Path) -> None:
    """By a script whose own folder takes the working directory's place on the path, as that of the
    command `launcher` does: what `python -m launcher` finds is found."""
    command = [sys.executable, TRAIN, f"TASK.NAME={name}:Mine", "--check"]
    with Job(command, cwd=repository) as job:
        assert "WINDOW: 16" in job.wait().ok().out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P")
def test_a_safe_path_stays_so(repository: Path) -> None:
    with Job([sys.executable, "-P", TRAIN, "TASK.NAME=nets.deep:Mine"], cwd=repository) as job:
        assert "there is no module nets.deep" in job.wait().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tasks/rooted.py", "pack/relative.py"])
def test_it_trains_under_torchrun_with_loader_workers(name: str, repository: Path) -> None:
    """And the files that it is made of are kept with the run."""
    words = ["TRAIN.DURATION", "2step", "TASK.TRAIN_SAMPLES", 64, "DATALOADER.NUM_WORKERS", 1]
    train(f"TASK.NAME={name}:Mine", *words, ranks=2, cwd=repository).ok()
    run = repository / "runs/Mine"
    assert status(run)["state"] == "completed"
    kept = {path.name for path in (run / "code/step_0/files").rglob("*.py")}
    assert kept >= {Path(name).name, "deep.py" if "rooted" in name else "near.py"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tasks/rooted.py", "tasks/beside.py", "pack/relative.py"])
def test_a_replay_takes_all_of_a_runs_own_code(name: str, repository: Path) -> None:
    """Whatever has become of the files since: `launcher replay --code run`."""
    words = ["TRAIN.DURATION", "4step", "TASK.TRAIN_SAMPLES", 64, "LOG.EVERY", "1step"]
    train(f"TASK.NAME={name}:Mine", *words, "CHECKPOINT.EVERY", "2step", cwd=repository).ok()
    for file in repository.glob("*/*.py"):
        file.write_text(file.read_text().replace("2.0", "3.0"))
    for code, told in (("run", "the same: "), ("now", "NOT the same: ")):
        with Forked(["replay", "runs/Mine", "--step", 4, "--code", code], cwd=repository) as job:
            assert told in job.wait().out


class Terminal:
    """A terminal of 100 columns in a tmux server of its own."""

    def __init__(self, command: str) -> None:
        self.server = f"launcher-test-{uuid.uuid4().hex[:8]}"
        self.env = clean_environment({"LC_ALL": "C.UTF-8", "TERM": "xterm"})
        self.env.pop("TMUX", None)
        self("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "50", "sh")
        self("send-keys", f"export TERM=xterm PS1='$ '; clear; {command}; echo ended: $?", "Enter")

    def __call__(self, *words: str) -> str:
        command = ["tmux", "-u", "-L", self.server, *words]
        return subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    def screen(self) -> str:
        return self("capture-pane", "-p", "-J")

    def close(self) -> None:
        self("kill-server")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux for a real terminal")
def test_a_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    """Item 7: a bar while training, log lines above it, and a clean screen at the end."""
    run = tmp_path / "run"
    words = ["TRAIN.BATCH_SIZE", 5, "TRAIN.DURATION", "6ep", "LOG.EVERY", "1step"]
    command = [sys.executable, TRAIN, *noted(run, *words)]
    terminal = Terminal("LAUNCHER_TEST_SLEEP=0.1 " + shlex.join(map(str, command)))
    bar = re.compile(r"^step +(\d+)/42 [━╸╺─ ]+.*loss", re.MULTILINE)
    seen: list[str] = []

    def ended() -> str | None:
        screen = terminal.screen()
        seen.extend([screen] if bar.search(screen) else [])
        return screen if re.search(r"^ended: \d", screen, re.MULTILINE) else None

    try:
        screen = wait_until(ended, what="the end of the run")
    finally:
        terminal.close()
    print(screen)
    assert "ended: 0" in screen
    assert len({bar.search(s)[1] for s in seen}) > 3, "the bar must move"
    assert all(len(bar.findall(s)) == 1 for s in seen), "one bar at a time"
    assert any("val/loss" in s[: bar.search(s).start()] for s in seen), "log lines stand above it"
    assert not bar.search(screen) and "━" not in screen
    assert len(re.findall(r" I step \d+  epoch \d  val/loss", screen)) == 6
    log = (run / "logs/rank0.log").read_text()
    assert "\x1b" not in log and "\r" not in log and "━" not in log
    assert log.count("grad_norm") == 42, "the log file has the lines that the bar stands for"
