"""What people see of a run that fails: who was first, and why; and no hang (issue 5, items 3-5)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system import jobs

TASK = Path(__file__).with_name("failing_task.py")
COMMON = [
    *("TASK.NAME", f"{TASK}:Failing", "TRAIN.DURATION", "20step", "TRAIN.BATCH_SIZE", "16"),
    *("LOG.EVERY", "1step", "CHECKPOINT.EVERY", "3step", "EVAL.EVERY", ""),
    *("DIST.TRAIN_TIMEOUT", "4s", "DATALOADER.NUM_WORKERS", "0"),
]


def failing(
    tmp_path: Path, what: str, rank: int = 1, ranks: int | None = 2, **options: Any
) -> tuple[jobs.Ended, dict[str, Any]]:
    run = tmp_path / "run"
    args = [*COMMON, "TASK.FAILURE", what, "TASK.RANK", rank, "OUTPUT_DIR", run]
    ended = jobs.train(*args, ranks=ranks, timeout=90, **options)
    assert ended.code == 1, ended.output
    assert jobs.status(run)["state"] == "failed"
    failure = jobs.strict_json((run / "failure.json").read_text())
    assert failure["rank"] == rank
    told = [record for record in jobs.history(run) if record["event"] == "failure"]
    assert len(told) == 1 and told[0]["rank"] == rank
    lines = [line for line in ended.err.splitlines() if line.startswith("launcher: rank")]
    assert len(lines) == 1 and f"rank {rank} on " in lines[0] and "failed first" in lines[0]
    return ended, failure


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [
        (1, 2),
        (0, None),
        pytest.param(0, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_the_first_exception_is_what_people_see(
    rank: int, ranks: int | None, tmp_path: Path
) -> None:
    _, failure = failing(tmp_path, "raise", rank, ranks)
    assert failure["exception"] == "ValueError: a planned failure"
    assert "in _fail" in failure["traceback"] and failure["step"] == 5
    assert any("a planned failure" in line for line in failure["log"])


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_told_of_by_the_others(rank: int, tmp_path: Path) -> None:
    """Also where it was rank 0: the lowest living rank writes."""
    _, failure = failing(tmp_path, "kill", rank)
    assert f"rank {rank} was killed from outside" in failure["exception"]
    assert "GiB of memory" in failure["exception"]


def test_short_device_memory_names_the_key_to_change(tmp_path: Path) -> None:
    _, failure = failing(tmp_path, "memory", 0, None)
    assert "TRAIN.MICRO_BATCH_SIZE 8 needs about half the memory" in failure["exception"]


@pytest.mark.parametrize(
    ("what", "rank", "ranks"),
    [
        ("freeze", 1, 2),
        ("freeze", 0, 2),
        ("hang", 0, None),
        pytest.param("hang", 1, 2, marks=pytest.mark.slow),
        ("gil", 1, 2),
        pytest.param("gil", 0, 2, marks=pytest.mark.slow),
        pytest.param("freeze", 2, 4, marks=pytest.mark.slow),
        pytest.param("hang", 0, 2, marks=pytest.mark.slow),
    ],
)
def test_a_hang_names_its_rank(what: str, rank: int, ranks: int | None, tmp_path: Path) -> None:
    """Frozen, or asleep in a step: named within DIST.TRAIN_TIMEOUT, ended within 40 s more."""
    ended, failure = failing(tmp_path, what, rank, ranks)
    assert failure["step"] == 5 and failure["exception"].startswith("hang: nothing has moved for")
    if what == "freeze":
        assert "stopped" in failure["traceback"]  # its process's state
    elif what == "gil":
        assert "sleeping" in failure["traceback"]  # the same; its stack is written by a timer
        log = (tmp_path / f"run/logs/rank{rank}.log").read_text()
        assert "Timeout" in log and "in _fail" in log
    else:
        assert "in _fail" in failure["traceback"]
    for other in range(ranks or 1):
        if what in ("freeze", "gil") and other == rank:
            continue
        else:
            log = (tmp_path / f"run/logs/rank{other}.log").read_text()
            assert "thread MainThread" in log and "in train" in log
    assert ended.seconds < 90  # bounds the test; what is measured stands in docs/clusters.md


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
@pytest.mark.parametrize("slow", ["summary", "evaluation"])
def test_rank_0_may_be_slow_alone(slow: str, tmp_path: Path) -> None:
    """Evaluation batches are progress, and what rank 0 does alone has a timeout of its own."""
    args = [*COMMON, "TASK.SLOW", slow, "EVAL.EVERY", "20step", "EVAL.BATCH_SIZE", "10"]
    jobs.train(*args, "OUTPUT_DIR", tmp_path / "run", ranks=2, timeout=120).ok()


@pytest.mark.parametrize(
    ("slow", "rank", "ranks"),
    [
        pytest.param("data", 0, 2, marks=pytest.mark.slow),
        ("train", 1, 2),
        pytest.param("train", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named(slow: str, rank: int, ranks: int, tmp_path: Path) -> None:
    """Item 6: by its own part of the steps; the others wait for it, and take as long."""
    run = tmp_path / "run"
    args = [*COMMON, "LOG.EVERY", "4step", "TASK.SLOW", slow, "TASK.RANK", rank]
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
    assert [record["event"] for record in jobs.history(run)].count("resume") == 1
    jobs.train(*COMMON, "OUTPUT_DIR", whole, ranks=2).ok()
    ours, theirs = (jobs.state(path)["model"] for path in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert [record["step"] for record in jobs.metrics(run)] == list(range(1, 21))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("length", "the data sets' length is {'train': 80, 'val': 80}"),
        pytest.param("model", "the model's layout is", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_built_different_things_are_named(what: str, told: str, tmp_path: Path) -> None:
    """Item 5: before the first step, with nothing made."""
    run = tmp_path / "run"
    ended = jobs.train(*COMMON, "TASK.FAILURE", what, "OUTPUT_DIR", run, ranks=2, timeout=60)
    assert ended.code == 1 and not run.exists()
    assert told in ended.err and "rank 1 on" in ended.err


@pytest.mark.parametrize(
    ("name", "told"),
    [("config", "OPTIM.LR is 0.2, on rank 0 0.1"), ("code", "code of")],
)
def test_ranks_that_disagree_are_named(name: str, told: str, tmp_path: Path) -> None:
    """Item 5: before anything is built, and with nothing made."""
    run = tmp_path / "run"
    wrapper = tmp_path / "start.py"
    code = TASK.read_text()
    (tmp_path / "task.py").write_text(code)
    (tmp_path / "other.py").write_text(code + "\n")
    wrapper.write_text(
        "import os, shutil, sys\n"
        f"sys.path.insert(0, {str(jobs.ROOT)!r})\n"
        "from launcher.cli import main\n"
        "odd = os.environ['RANK'] == '1'\n"
        f"what = {json.dumps(name)}\n"
        f"folder = {str(tmp_path)!r} + ('/odd' if odd else '/even')\n"
        "os.makedirs(folder)\n"
        f"source = {str(tmp_path)!r} + ('/other.py' if odd and what == 'code' else '/task.py')\n"
        "shutil.copy(source, folder + '/task.py')\n"
        "os.chdir(folder)\n"
        "more = ['OPTIM.LR=0.2'] if odd and what == 'config' else []\n"
        f"sys.exit(main(['train', 'TASK.NAME=task.py:Failing', 'OUTPUT_DIR={run}', *more]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = jobs.Job([*torchrun, "--nproc-per-node=2", str(wrapper)], {}, tmp_path)
    ended = job.wait(60)
    assert ended.code == 1
    assert "The ranks disagree" in ended.err and told in ended.err and "rank 1 on" in ended.err
    assert not run.exists()
