"""What people see of a run that fails: who was first, and why; and no hang (issue 5, items 3-5)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system import jobs
from tests.system.jobs import slow

TASK = Path(__file__).with_name("failing_task.py")
COMMON = [
    *("TASK.NAME", f"{TASK}:Failing", "TRAIN.DURATION", "20step", "TRAIN.BATCH_SIZE", "16"),
    *("LOG.EVERY", "1step", "CHECKPOINT.EVERY", "3step", "EVAL.EVERY", ""),
    *("DIST.TRAIN_TIMEOUT", "4s", "DATALOADER.NUM_WORKERS", "0"),
]


def failing(
    tmp_path: Path, what: str, rank: int = 1, ranks: int | None = 2
) -> tuple[jobs.Ended, dict[str, Any]]:
    run = tmp_path / "run"
    args = [*COMMON, "TASK.FAILURE", what, "TASK.RANK", rank, "OUTPUT_DIR", run]
    ended = jobs.train(*args, ranks=ranks, timeout=90, cold=True)
    assert ended.code == 1, ended.output
    assert jobs.status(run)["state"] == "failed"
    failure = jobs.failure(run)
    assert failure["rank"] == rank
    (told,) = jobs.history(run, "failure")
    assert told == jobs.history(run)[-1] and told["rank"] == rank
    assert told["step"] == failure["step"] == jobs.status(run)["step"]
    lines = [line for line in ended.err.splitlines() if line.startswith("launcher: rank")]
    assert len(lines) == 1 and f"rank {rank} on " in lines[0] and "failed first" in lines[0]
    return ended, failure


@pytest.mark.parametrize(("rank", "ranks"), [(1, 2), slow(0, None), slow(0, 2), slow(2, 4)])
def test_the_first_exception_is_what_people_see(
    rank: int, ranks: int | None, tmp_path: Path
) -> None:
    """On the console, in the run's records, and in the log of its rank alone."""
    ended, failure = failing(tmp_path, "raise", rank, ranks)
    exception, line = "ValueError: a planned failure", 'raise ValueError("a planned failure")'
    assert failure["exception"] == exception and failure["step"] == 5
    assert "in _fail" in failure["traceback"] and "in train_step" in failure["traceback"]
    assert any("a planned failure" in line for line in failure["log"])
    assert re.search(rf"rank {rank} on \S+ failed first, .*: {exception}", ended.err)
    assert "in train_step" in ended.err
    assert ranks or ended.output.count(exception) == 1
    status = jobs.status(tmp_path / "run")
    assert status["step"] == 5 and "planned failure" in status["reason"]
    for other in range(ranks or 1):
        log = (tmp_path / f"run/logs/rank{other}.log").read_text()
        if other == rank:
            assert exception in log and "in train_step" in log and line in log
        else:
            assert line not in log


@pytest.mark.parametrize("rank", [0, slow(1)])
def test_a_killed_rank_is_told_of_by_the_others(rank: int, tmp_path: Path) -> None:
    """Also where it was rank 0: the lowest living rank writes."""
    _, failure = failing(tmp_path, "kill", rank)
    assert f"rank {rank} was killed from outside" in failure["exception"]
    assert "GiB of memory" in failure["exception"]


@pytest.mark.parametrize(
    ("what", "signal", "rank", "ranks"),
    [
        *(("abort", "SIGABRT", 1, 2), slow("abort", "SIGABRT", 0, 4)),
        *(slow("segv", "SIGSEGV", 0, 2), slow("bus", "SIGBUS", 1, 2)),
    ],
)
def test_a_rank_that_native_code_ends_is_told_of_with_its_last_words(
    what: str, signal: str, rank: int, ranks: int, tmp_path: Path
) -> None:
    """Its stderr, which also stands where it always did, and where it was in Python."""
    ended, failure = failing(tmp_path, what, rank, ranks)
    assert f"rank {rank} was ended by {signal}, from its own" in failure["exception"]
    assert "killed from outside" not in ended.err
    assert "in _fail" in failure["traceback"] and "in _fail" in ended.err
    if what == "abort":
        lines = failure["traceback"].splitlines()
        assert "from Python" in lines and "terminate called after throwing" in failure["traceback"]
        assert "terminate called after throwing" in ended.err


def test_short_device_memory_names_the_key_to_change(tmp_path: Path) -> None:
    _, failure = failing(tmp_path, "memory", 0, None)
    assert "TRAIN.MICRO_BATCH_SIZE 8 needs about half the memory" in failure["exception"]


@pytest.mark.parametrize(
    ("what", "rank", "ranks"),
    [
        *(slow("freeze", 1, 2), ("freeze", 0, 2), slow("freeze", 2, 4)),
        *(slow("hang", 0, None), slow("hang", 1, 2), slow("hang", 0, 2)),
        *(slow("gil", 1, 2), slow("gil", 0, 2)),
    ],
)
def test_a_hang_names_its_rank(what: str, rank: int, ranks: int | None, tmp_path: Path) -> None:
    """Frozen, or asleep in a step: named within DIST.TRAIN_TIMEOUT, ended within 40 s more; what is
    measured stands in docs/clusters.md."""
    _, failure = failing(tmp_path, what, rank, ranks)
    assert failure["step"] == 5 and failure["exception"].startswith("hang: nothing has moved for")
    # Its stack, or its process's state.
    assert {"freeze": "stopped", "gil": "sleeping", "hang": "in _fail"}[what] in failure[
        "traceback"
    ]
    for other in range(ranks or 1):
        log = (tmp_path / f"run/logs/rank{other}.log").read_text()
        if other != rank or what == "hang":
            assert "thread MainThread" in log and "in train" in log
        elif what == "gil":
            assert "Timeout" in log and "in _fail" in log  # its stack is written by a timer


def test_a_hang_where_a_checkpoint_is_taken_names_its_rank(tmp_path: Path) -> None:
    """What ranks do together for it has the timeout of a step: only writing has a long one."""
    args = [*COMMON, "TASK.FAILURE", "freeze before a save", "OUTPUT_DIR", tmp_path / "run"]
    assert jobs.train(*args, ranks=2, timeout=60).code == 1
    failure = jobs.failure(tmp_path / "run")
    assert (failure["rank"], failure["step"]) == (1, 3)
    assert "all ranks wait for rank 1" in failure["exception"]


@pytest.mark.slow
def test_a_hang_in_eval_only_names_its_rank(tmp_path: Path) -> None:
    """On the console; the run's own status and failure.json are not those of an evaluation."""
    run = tmp_path / "run"
    jobs.train(*COMMON, "TRAIN.DURATION", "3step", "OUTPUT_DIR", run).ok()
    args = [*COMMON, "TASK.SLOW", "stuck", "EVAL.BATCH_SIZE", "16", "OUTPUT_DIR", run]
    ended = jobs.train(*args, "--eval-only", ranks=2, timeout=90)
    assert ended.code == 1
    assert "launcher: rank 1 on " in ended.err and "failed first" in ended.err
    assert "in eval_step" in ended.err
    assert jobs.status(run)["state"] == "completed" and not (run / "failure.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["summary", "evaluation"])
def test_rank_0_may_be_slow_alone(what: str, tmp_path: Path) -> None:
    """Evaluation batches are progress, and what rank 0 does alone has a timeout of its own."""
    args = [*COMMON, "TASK.SLOW", what, "EVAL.EVERY", "20step", "EVAL.BATCH_SIZE", "10"]
    jobs.train(*args, "OUTPUT_DIR", tmp_path / "run", ranks=2, timeout=120).ok()


@pytest.mark.parametrize(
    ("what", "rank", "ranks"), [slow("data", 0, 2), ("train", 1, 2), slow("train", 2, 4)]
)
def test_a_slow_rank_is_named(what: str, rank: int, ranks: int, tmp_path: Path) -> None:
    """Item 6: by its own part of the steps; the others wait for it, and take as long."""
    run = tmp_path / "run"
    args = [*COMMON, "LOG.EVERY", "4step", "TASK.SLOW", what, "TASK.RANK", rank]
    ended = jobs.train(*args, "OUTPUT_DIR", run, ranks=ranks).ok()
    records = [record for record in jobs.metrics(run) if "perf/step_s" in record]
    assert len(records) == 5
    for record in records:
        assert record["perf/slowest_rank"] == rank
        assert record["perf/rank_spread_s"] > 0.3 * record["perf/step_s"]
    assert ended.err.count(f"rank {rank} holds the others up") == 1
    log = (run / "logs/rank0.log").read_text()
    assert log.count(f"own seconds a step by rank, slowest first: {rank}: 0.") == 5


def test_a_killed_rank_and_max_restarts(tmp_path: Path) -> None:
    """Item 3: torchrun starts the ranks again, and they go on from the newest checkpoint."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    once = ["TASK.FAILURE", "kill", "TASK.ONCE", tmp_path / "killed", "TASK.AT", "8"]
    jobs.train(*COMMON, *once, "OUTPUT_DIR", run, ranks=2, options=["--max-restarts=2"]).ok()
    assert jobs.status(run)["state"] == "completed"
    assert len(jobs.history(run, "resume")) == 1
    jobs.train(*COMMON, "OUTPUT_DIR", whole, ranks=2).ok()
    ours, theirs = (jobs.state(path)["model"] for path in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    steps = [record["step"] for record in jobs.metrics(run) if "train/loss" in record]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("length", "the data sets' length is {'train': 80}"),
        slow("model", "the model's layout is"),
    ],
)
def test_ranks_that_built_different_things_are_named(what: str, told: str, tmp_path: Path) -> None:
    """Item 5: before the first step, with nothing made."""
    run = tmp_path / "run"
    ended = jobs.train(*COMMON, "TASK.FAILURE", what, "OUTPUT_DIR", run, ranks=2, timeout=60)
    assert ended.code == 1 and not run.exists()
    assert told in ended.err and "rank 1 on" in ended.err


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("config.yaml", "OPTIM: {LR: 0.2}", "OPTIM.LR is 0.2, on rank 0 0.1"),
        slow("task.py", "\n", "code of"),
    ],
)
def test_ranks_that_disagree_are_named(name: str, more: str, told: str, tmp_path: Path) -> None:
    """Item 5: before anything is built, and with nothing made. Each rank has a folder of its own
    here, and one of them a file with more in it."""
    run = tmp_path / "run"
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "config.yaml").write_text("TASK: {NAME: task.py:Failing}\n")
        (tmp_path / rank / "task.py").write_text(TASK.read_text())
    with (tmp_path / "1" / name).open("a") as file:
        file.write(more)
    inside = f"cd $RANK && exec {sys.executable} {jobs.TRAIN} --config-file config.yaml $@"
    torchrun = [*jobs.TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python"]
    with jobs.Job([*torchrun, "sh", "-c", inside, "sh", "OUTPUT_DIR", run], cwd=tmp_path) as job:
        ended = job.wait(60)
    assert ended.code == 1
    assert "The ranks disagree" in ended.err and told in ended.err and "rank 1 on" in ended.err
    assert not run.exists()
