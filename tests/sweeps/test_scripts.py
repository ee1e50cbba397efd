"""The loop and the array job of a sweep: which points they start, and what they tell.

A stand-in for Python trains, as a plan says; everything else is the launcher's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.launched import run
from tests.runs.made import make_run
from tests.system import jobs

TRAIN = """
import json, os, sys, time
from pathlib import Path
if "train" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
run = Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
assert "--resume" in sys.argv and f"configs/{run.name}.yaml" in " ".join(sys.argv)
with open("calls", "a") as calls:
    print(run.name, file=calls)
plan = json.loads(Path("plan").read_text())
state = plan[run.name].pop(0)
Path("plan").write_text(json.dumps(plan))
if state == "wrong":
    sys.exit(2)
for step in range(99):
    if not (run / f"checkpoints/step_{step + 1}").exists():
        break
step += state != "failed"
(run / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
found = {"state": state, "step": step, "epoch": 0, "updated": time.time()}
(run / "status.json").write_text(json.dumps(found))
sys.exit({"completed": 0, "stopped": 75, "failed": 1}[state])
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture(autouse=True)
def sweep() -> None:
    """Five points, none of which has begun."""
    Path("base.yaml").write_text("TASK: {NAME: sine}\n")
    assert run("sweep base.yaml --grid SEED=0,1,2,3,4 -o dir") == 0
    Path("bin").mkdir()
    programs = {"python": f"#!{sys.executable}{TRAIN}", "srun": SRUN}
    programs["scontrol"] = '#!/bin/sh\necho "$@" >> requests\n'
    for name, text in programs.items():
        (Path("bin") / name).write_text(text)
        (Path("bin") / name).chmod(0o755)


def start(script: str, plan: dict[str, list[str]], **env: str) -> jobs.Job:
    Path("plan").write_text(json.dumps(plan))
    Path("calls").unlink(missing_ok=True)
    here = Path.cwd()
    env |= {"PATH": f"{here}/bin{os.pathsep}{os.environ['PATH']}", "PYTHON": f"{here}/bin/python"}
    return jobs.Job(["bash", f"dir/{script}"], env, here)


def calls() -> list[str]:
    return Path("calls").read_text().split() if Path("calls").exists() else []


def test_the_loop_runs_what_is_left_to_run() -> None:
    make_run(Path("dir/runs/000"), state="completed")
    make_run(Path("dir/runs/004"), state="running", updated=time.time())
    plan = {"001": ["stopped", "completed"], "002": ["failed", "failed"], "003": ["wrong"]}
    ended = start("sweep.sh", plan).wait()
    assert calls() == ["001", "001", "002", "002", "003"]
    assert ended.code == 1
    assert "failed: 002 003" in ended.err and "running elsewhere: 004" in ended.err


@pytest.mark.slow
def test_the_loop_once_more() -> None:
    """When what was wrong is mended: only that."""
    for name in ("000", "001"):
        make_run(Path("dir/runs") / name, state="completed")
    make_run(Path("dir/runs/002"), state="failed")
    make_run(Path("dir/runs/004"), state="running", updated=time.time())
    ended = start("sweep.sh", {"002": ["completed"], "003": ["completed"]}).wait()
    assert calls() == ["002", "003"] and ended.code == 75
    (Path("dir/runs/004/status.json")).write_text(Path("dir/runs/000/status.json").read_text())
    ended = start("sweep.sh", {}).wait()
    assert calls() == [] and ended.code == 0, ended.output


@pytest.mark.slow
def test_a_loop_that_is_asked_to_stop_stops_its_run() -> None:
    Path("bin/python").write_text(
        Path("bin/python").read_text().replace("state = plan", "time.sleep(60)\nstate = plan")
    )
    with start("sweep.sh", {"000": ["completed"]}) as loop:
        loop.until(lambda: calls() == ["000"], "the first point")
        os.kill(loop.pid, signal.SIGTERM)
        assert loop.wait().code != 0
    assert calls() == ["000"]


def array(plan: dict[str, list[str]], point: int, **env: str) -> jobs.Ended:
    where = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(point), "SLURM_JOB_ID": "77"}
    return start("sweep.sbatch", plan, **where, **env).wait()


def test_the_array_requeues_its_own_point_alone() -> None:
    assert "#SBATCH --array=0-4\n" in Path("dir/sweep.sbatch").read_text()
    ended = array({"001": ["stopped"]}, 1)
    # The number of the job alone would stand for all points.
    assert ended.code == 0 and Path("requests").read_text() == "requeue 77_1\n", ended.output
    assert array({"001": ["completed"]}, 1, SLURM_RESTART_COUNT="1").code == 0
    assert array({"001": []}, 1).code == 0 and calls() == []
    assert not list(Path("dir").glob("slurm-*"))


@pytest.mark.slow
def test_the_array_hides_no_failure() -> None:
    assert array({"002": ["failed"]}, 2).code == 0  # once more, in vain
    assert array({"002": ["failed"]}, 2, SLURM_RESTART_COUNT="1").code == 1
    assert array({"003": ["wrong"]}, 3).code == 2
    Path("dir/runs/002/STOP").touch()
    ended = array({"002": []}, 2, SLURM_RESTART_COUNT="2")
    assert ended.code == 1 and calls() == []
    make_run(Path("dir/runs/004"), state="running", updated=time.time())
    assert array({"004": []}, 4).code == 3


@pytest.mark.slow
def test_a_real_sweep() -> None:
    """Killed in its midst, and started again: each point is what it is by itself."""
    task = jobs.ROOT / "tests/api/line.py"
    Path("base.yaml").write_text(
        f"TASK: {{NAME: '{task}:Line'}}\nDIST: {{DEVICE: cpu}}\nTRAIN: {{DURATION: 300step}}\n"
        "CHECKPOINT: {EVERY: 50step}\nEVAL: {EVERY: 100step}\nLOG: {LEVEL: WARNING}\n"
    )
    assert run("sweep base.yaml --grid OPTIM.LR=0.05,0.01 -o real") == 0
    env = {"PYTHON": sys.executable}
    with jobs.Job(["bash", "real/sweep.sh"], env, Path.cwd()) as loop:
        jobs.wait_for_save(Path("real/runs/000"), 50, loop)
        loop.kill()
    jobs.Job(["bash", "real/sweep.sh"], env, Path.cwd()).wait().ok()
    for name in ("000", "001"):
        alone = Path.cwd() / "alone" / name
        config = Path.cwd() / f"real/configs/{name}.yaml"
        jobs.train("--config-file", config, "OUTPUT_DIR", alone).ok()
        ours, theirs = (jobs.values(of, "val/loss") for of in (Path("real/runs") / name, alone))
        assert ours == theirs and max(ours) == 300
