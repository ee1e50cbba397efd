"""`launcher doctor` as it is called: alone, with a config, and on the ranks of a job."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.system.jobs import DIGITS, ROOT, TORCHRUN, Ended, Job, launch, snapshot, without_torch

PLANTED = ROOT / "tests/debug/planted.py"
SMALL = ("TRAIN.BATCH_SIZE", 8, "DATALOADER.NUM_WORKERS", 1, "DIST.DEVICE", "cpu")


def page(ended: Ended) -> dict[tuple[str, str], dict[str, Any]]:
    """What --json has printed, by topic and name."""
    found = json.loads(ended.out[ended.out.index("[\n") :])
    assert all(set(one) == {"topic", "name", "state", "found", "remedy", "ranks"} for one in found)
    assert all(bool(one["remedy"]) == (one["state"] != "ok") for one in found)
    return {(one["topic"], one["name"]): one for one in found}


def test_alone_without_a_config_it_is_a_table() -> None:
    ended = launch("doctor")
    assert ended.code in (0, 1), ended.output  # a problem of the machine that runs this
    assert "torch" in ended.out and "gloo all-reduce" in ended.out and "MB/s" in ended.out
    assert (" problem " in ended.out) == (ended.code == 1)


def test_with_a_config_nothing_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = snapshot(tmp_path)
    words = ("TASK.NAME", f"{PLANTED}:Steady", "OUTPUT_DIR", run, *SMALL)
    ended = launch("doctor", "--json", *words)
    found = page(ended)
    first = found["determinism", "first steps"]
    assert (first["state"], first["found"]) == (
        "ok",
        "3 steps, twice from the same seed: equal bit for bit",
    )
    assert found["config", "disk for checkpoints"]["state"] == "ok"
    assert "1 worker x 2 batches" in found["config", "/dev/shm for loaders"]["found"]
    assert snapshot(tmp_path) == before


def test_a_problem_exits_with_1(tmp_path: Path) -> None:
    words = ("TASK.NAME", f"{PLANTED}:FromOutside", "OUTPUT_DIR", tmp_path / "run", *SMALL)
    ended = launch("doctor", "--steps", 1, *words)
    assert ended.code == 1
    assert "aten.mul.Tensor in the forward pass of 2.1 (Noisy), at" in ended.out
    assert not (tmp_path / "run").exists()


def test_a_config_that_its_task_cannot_follow(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(
        "class Bare:\n"
        "    def __init__(self, cfg): ...\n"
        "    def build_model(self): ...\n"
        "    def build_dataset(self, split): ...\n"
        "    def train_step(self, model, batch): ...\n"
    )
    ended = launch("doctor", "TASK.NAME", f"{file}:Bare")
    assert ended.code == 2 and "has no eval_step" in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["OPTIM.LR", "-1"], "OPTIM.LR"),
        (["SEEED", "1"], "did you mean SEED"),
        (["--steps", "-1"], "--steps must be at least 0"),
    ],
)
def test_mistakes_are_reported_as_by_train(words: list[str], told: str, tmp_path: Path) -> None:
    """Before torch is imported."""
    env = without_torch(tmp_path / "poison")
    command = ["-m", "launcher", "doctor", "--config-file", DIGITS, *words]
    import sys

    with Job([sys.executable, *command], {**env, "PYTHONPATH": f"{env['PYTHONPATH']}:{ROOT}"}) as j:
        ended = j.wait()
    assert ended.code == 2
    assert told in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "poison/imported").exists()


def test_ranks_are_compared(tmp_path: Path) -> None:
    """A variable that one rank has otherwise is named with the ranks; rank 0 alone prints."""
    words = ("TASK.NAME", f"{PLANTED}:TwoPhases", "OUTPUT_DIR", tmp_path / "run", *SMALL)
    script = Path(__file__).with_name("doctor_ranks.py")
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
    with Job([*torchrun, script, "--json", *words], {"OMP_NUM_THREADS": "1"}) as job:
        ended = job.wait()
    found = page(ended)
    host = found["ranks", "compared"]["found"].removeprefix("2 ranks, on ")
    threads, algorithm = (found["ranks", name] for name in ("OMP_NUM_THREADS", "NCCL_ALGO"))
    assert threads["state"] == algorithm["state"] == "warning"
    assert threads["found"] == f"1 on rank 0 ({host}); 2 on rank 1 ({host})"
    assert algorithm["found"] == f"not set on rank 0 ({host}); Tree on rank 1 ({host})"
    assert found["environment", "NCCL_ALGO"]["ranks"] == [1]
    assert found["builds", "torch"]["ranks"] == [0, 1]
    assert found["exchange", "gloo all-reduce"]["found"].startswith("16 MiB between 2 ranks: ")
    assert ("ranks", "clock") not in found and ("ranks", "torch") not in found
    first = found["determinism", "first steps"]
    assert first["state"] == "ok" and "rank 0's share of 2" in first["found"]
    assert ended.code == any(one["state"] == "problem" for one in found.values())
    assert not (tmp_path / "run").exists()
