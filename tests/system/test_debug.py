"""The debugging preset, debuggers and the dry run, as people use them."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.system import jobs
from tests.system.terminal import Terminal

TASK = Path(__file__).with_name("debug_task.py")
WORDS = ["TASK.NAME", f"{TASK}:Small", "TRAIN.BATCH_SIZE", "8"]


def wrong(what: str) -> dict[str, str]:
    return {"LAUNCHER_TEST_WRONG": what}


def line_of(words: str) -> int:
    lines = TASK.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if words in line)


def test_debug_shows_the_line_and_the_shapes(tmp_path: Path) -> None:
    ended = jobs.train("--debug", *WORDS, env=wrong("shape"))
    assert ended.code == 1
    assert f'debug_task.py", line {line_of("logits = model(doubled)")}, in train_step' in ended.err
    assert "the batch: {x: float32[8, 5], y: int64[8]}" in ended.err
    assert "the model's input (Sequential): float32[8, 5]" in ended.err
    assert "doubled float32[8, 5]" in ended.err


def test_debug_finds_the_operation_and_is_short(tmp_path: Path) -> None:
    ended = jobs.train("--debug", *WORDS, "OUTPUT_DIR", tmp_path / "run", env=wrong("nan"))
    assert ended.code == 1 and "returned nan values" in ended.err
    where = line_of('return {"loss": nn.functional.cross_entropy(logits, batch["y"])}')
    assert "Traceback of forward call" in ended.err
    assert f'debug_task.py", line {where}, in train_step' in ended.err
    run = tmp_path / "whole"
    jobs.train("--debug", *WORDS, "OUTPUT_DIR", run).ok()
    config = (run / "config.yaml").read_text()
    assert "NUM_WORKERS: 0" in config and "DETERMINISTIC: true" in config
    assert jobs.status(run)["step"] == 20 and 10 in jobs.values(run, "val/loss")


def test_the_debugger_opens_on_an_exception(tmp_path: Path) -> None:
    words = ["train", "--debug", *WORDS, "OUTPUT_DIR", tmp_path / "run"]
    with Terminal(*words, env=wrong("shape")) as shell:
        shell.until("(Pdb) ")
        shell.type("p tuple(doubled.shape), self.cfg.TASK.LABELS")
        assert "((8, 5), True)" in shell.until("(Pdb) ")
        shell.type("q")
        assert shell.end() == 1


@pytest.mark.parametrize(
    "command",
    [
        jobs.slow(("tools/train.py",), id="breakpoint"),
        pytest.param(("-m", "pdb", "-c", "continue", "tools/train.py"), id="python -m pdb"),
    ],
)
def test_a_breakpoint_of_the_tasks_own(command: Any, tmp_path: Path) -> None:
    """The guard takes nobody who looks around for one that hangs."""
    words = [*WORDS, "OUTPUT_DIR", tmp_path / "run", "LOG.PROGRESS_BAR", "False"]
    words += ["TRAIN.DURATION", "5step", "DIST.TRAIN_TIMEOUT", "1s", "DIST.INIT_TIMEOUT", "1s"]
    words += ["DATALOADER.NUM_WORKERS", "0"]
    with Terminal(*words, command=command, env=wrong("breakpoint")) as shell:
        shell.until("(Pdb) ")
        shell.type("import time; time.sleep(16); print('looked', 'around')")
        shell.until("looked around")
        shell.until("(Pdb) ")
        shell.type("c")
        if "pdb" in command:  # it starts the script over
            shell.until("(Pdb) ")
            shell.type("q")
        assert shell.end() == 0, shell.seen
    assert jobs.status(tmp_path / "run")["state"] == "completed"


def test_one_rank_waits_for_a_debugger_and_the_others_for_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *WORDS, "OUTPUT_DIR", run, "TRAIN.DURATION", "5step"]
    words += ["DEBUG.BREAK_RANK", "1", "DIST.TRAIN_TIMEOUT", "1s"]
    with jobs.Group(words, 2) as job:
        told = job.until(
            lambda: re.search(r"rank 1 waits for a debugger.* 127.0.0.1 (\d+)", job.output()),
            "the port",
        )
        with socket.create_connection(("127.0.0.1", int(told[1]))) as client:
            file = client.makefile("rw", buffering=1)
            seen = ""
            for said in ("import time; time.sleep(8)\n", "p 'rank', self.run.runtime.rank\n"):
                while "(Pdb)" not in seen:
                    seen += file.read(1)
                seen = ""
                file.write(said)
                file.flush()
            while "(Pdb)" not in seen:
                seen += file.read(1)
            assert "('rank', 1)" in seen and job.poll() is None
            file.write("c\n")
            file.flush()
            job.wait().ok()
    assert jobs.status(run)["state"] == "completed"
    ended = jobs.train(*WORDS, "OUTPUT_DIR", tmp_path / "other", "DEBUG.BREAK_RANK", "1")
    assert ended.code == 2 and "the last rank is 0" in ended.err


@pytest.mark.parametrize("ranks", [jobs.slow(None), 2])
def test_a_dry_run_goes_through_everything(ranks: int | None, tmp_path: Path) -> None:
    words = ["--dry-run", *WORDS, "OUTPUT_DIR", tmp_path / "run", "EVAL.SPLITS", "[val, train]"]
    ended = jobs.train(*words, ranks=ranks, cold=ranks is not None).ok()
    for phase in ("build everything", "train for a step", "evaluate val", "evaluate train_eval"):
        assert len(re.findall(rf"^  {phase}.* [\d.]+ s +[\d.]+ GiB", ended.out, re.M)) >= 1, phase
    assert "save a checkpoint" in ended.out and "load the checkpoint" in ended.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [jobs.slow("eval_step"), "summarize"])
def test_a_dry_run_finds_what_would_fail_late(what: str, tmp_path: Path) -> None:
    ended = jobs.train("--dry-run", *WORDS, env=wrong(what))
    assert ended.code == 1 and "as planted" in ended.err
    assert re.search(r"^  evaluate val", ended.out, re.M)  # it came so far


def test_a_dry_run_fails_where_a_sink_does_which_ends_no_run() -> None:
    sink = ("CALLBACKS", f"[{Path(__file__).with_name('debug_task.py')}:FullDisk]")
    ended = jobs.train("--dry-run", *WORDS, *sink)
    assert ended.code == 1 and "a full disk: " in ended.err and "as planted" in ended.err


@pytest.mark.parametrize(
    ("labels", "verdict"), [("True", "near zero: the task"), jobs.slow("False", "no ")]
)
def test_overfitting_says_how_it_went(labels: str, verdict: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*WORDS, "OUTPUT_DIR", run, "DEBUG.OVERFIT_BATCHES", "2", "TASK.LABELS", labels]
    words += ["TRAIN.DURATION", "150ep", "EVAL.EVERY", "150ep", "CHECKPOINT.EVERY", ""]
    ended = jobs.train(*words, "OPTIM.LR", "0.1", "LOG.EVERY", "50step").ok()
    assert f": {verdict}" in ended.err.replace("NOT near", "no near")
    last = jobs.metrics(run)[-2:]
    evaluated = next(r["train_eval/loss"] for r in last if "train_eval/loss" in r)
    assert evaluated < 0.05 if labels == "True" else evaluated > 0.5
    assert jobs.environment(run)["total_steps"] == 300
