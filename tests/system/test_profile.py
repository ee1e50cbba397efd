"""Profiles, the model's summary and the flight recorder in whole runs of two ranks."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch._C._distributed_c10d as c10d

from tests.system import jobs
from tests.system.exact import COMMON, assert_same, assert_same_weights
from tests.system.test_failures import COMMON as FAILING

HERE = Path(__file__).parent


@pytest.mark.slow
def test_whatever_looks_at_a_run_changes_no_bit_of_it(tmp_path: Path) -> None:
    """Neither weights nor records; and a run that goes on may begin to look."""
    plain, run, again = (tmp_path / name for name in ("plain", "run", "again"))
    looking = (*("DEBUG.PROFILE", "1ep", "DEBUG.MEMORY", "True", "LOG.COUNT_FLOPS", "True"),)
    jobs.train(*COMMON, "LOG.MODEL_SUMMARY", "False", "OUTPUT_DIR", plain, ranks=2).ok()
    told = jobs.train(*COMMON, *looking, "OUTPUT_DIR", run, ranks=2).ok()
    assert_same(run, plain)
    assert "DEBUG.MEMORY: nothing to record" in told.err
    sizes = [32, 640, 640, 640 // 3, 2]
    count = sum(a * b + b for a, b in itertools.pairwise(sizes))
    assert f"Sequential: {count:,} parameters, {count:,} of them trainable" in told.err
    assert (
        told.err.count("kept for the backward pass") == 1 == told.err.count("FLOPs of a sample by")
    )
    # Epochs of 52 samples are 7 steps of 8; three of the four are traced, on each rank.
    files = {str(path.relative_to(run / "profile")) for path in run.glob("profile/*/*")}
    assert files == {
        f"step_{step}/rank{rank}.{kind}"
        for step in (7, 14, 21)
        for rank in range(2)
        for kind in ("pt.trace.json", "txt")
    }
    trace = json.loads((run / "profile/step_7/rank1.pt.trace.json").read_text())
    assert any("gloo:all_reduce" in str(event.get("name")) for event in trace["traceEvents"])
    assert trace["distributedInfo"]["rank"] == 1
    assert (
        not (plain / "profile").exists()
        and "parameters" not in (plain / "logs/rank0.log").read_text()
    )

    start = ("--resume-from", plain / "checkpoints/step_24", "OUTPUT_DIR", again)
    told = jobs.train(*COMMON, *looking, *start, ranks=2).ok()
    assert_same_weights(again, plain)
    assert [path.name for path in (again / "profile").iterdir()] == ["step_28"]
    assert "the optimiser keeps" not in told.err  # known at the start


@pytest.mark.skipif(not hasattr(c10d, "_dump_fr_trace"), reason="this torch records NCCL alone")
def test_a_hang_is_told_with_the_last_collective_of_each_rank(tmp_path: Path) -> None:
    run, task = tmp_path / "run", f"{HERE / 'flight_task.py'}:Recorded"
    options = ("TASK.NAME", task, "TASK.FAILURE", "hang", "TASK.RANK", "1", "OUTPUT_DIR", run)
    assert jobs.train(*FAILING, *options, ranks=2, timeout=90).code == 1
    told = jobs.failure(run)
    assert told["rank"] == 1 and told["exception"].startswith("hang: ")
    waits, hangs = (told["collectives"][rank] for rank in ("0", "1"))
    assert waits["name"].startswith("gloo:") and waits["sequence"] > hangs["sequence"]
    assert "engine/step.py" in waits["begun_at"]
    for rank in range(2):
        kept = pickle.loads((run / f"logs/flight/rank{rank}").read_bytes())
        assert kept["entries"]
