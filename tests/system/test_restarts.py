"""torchrun starts a failed run again: with several agents, with fewer and with more ranks (issue 5,
item 3)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system import jobs
from tests.system.test_exact import wait_for_step
from tests.system.test_failures import COMMON

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Agents:
    """torchruns of one job on one machine, one for each node."""

    def __init__(self, nodes: str, args: list[Any], **env: str) -> None:
        self.nodes, self.args, self.env = nodes, [*map(str, args)], ONE_THREAD | env
        self.port, self.jobs = jobs.free_port(), list[jobs.Job]()

    def start(self, node: int, host: bool = False) -> jobs.Job:
        """Nodes are numbered by their addresses, so that of the lower one has the lower ranks."""
        conf = f"is_host={int(host)},keep_alive_interval=1,keep_alive_max_attempt=5"
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.nodes}"),
            *("--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=job", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--local-addr=127.0.0.{node}"),
            *("--rdzv-conf", f"{conf},last_call_timeout=1"),
        ]
        self.jobs.append(jobs.Job([*torchrun, str(jobs.TRAIN), *self.args], self.env, jobs.ROOT))
        return self.jobs[-1]

    def output(self) -> str:
        return "".join(jobs.read(file) for job in self.jobs for file in (job.out, job.err))

    def kill(self) -> None:
        for job in self.jobs:
            if job.process.poll() is None:
                job.kill()


@pytest.fixture
def started() -> Iterator[list[Agents]]:
    found: list[Agents] = []
    yield found
    for agents in found:
        agents.kill()


def assert_like(run: Path, reference: Path, exactly: bool) -> None:
    """The same weights, and each step's record once."""
    assert jobs.status(run)["state"] == "completed"
    ours, theirs = (jobs.state(path)["model"] for path in (run, reference))
    for name, tensor in theirs.items():
        if exactly:
            assert torch.equal(ours[name], tensor)
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    steps = [record["step"] for record in jobs.metrics(run)]
    assert steps == [record["step"] for record in jobs.metrics(reference)]
    assert len(set(steps)) == len(steps)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_of_two_agents(rank: int, started: list[Agents], tmp_path: Path) -> None:
    """Each torchrun starts its rank again, in whichever order; the same bits in the end."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    once = ["TASK.FAILURE", "kill", "TASK.RANK", rank, "TASK.ONCE", tmp_path / "x", "TASK.AT", "8"]
    agents = Agents("2", [*COMMON, *once, "OUTPUT_DIR", run])
    started.append(agents)
    both = [agents.start(1, host=True), agents.start(2)]
    for job in both:
        job.wait(120).ok()
    assert [record["event"] for record in jobs.history(run)].count("resume") == 1
    jobs.train(*COMMON, "OUTPUT_DIR", whole, ranks=2, env=ONE_THREAD).ok()
    assert_like(run, whole, exactly=True)


def wait_for(run: Path, event: str, world_size: int, agents: Agents) -> None:
    """Wait until the run was started or resumed with so many ranks."""
    deadline = time.monotonic() + 90
    while not any(
        record["event"] == event and record["world_size"] == world_size
        for record in (jobs.history(run) if (run / "history.jsonl").exists() else [])
    ):
        assert time.monotonic() < deadline, agents.output()
        time.sleep(0.05)


@pytest.mark.slow
def test_fewer_and_more_nodes(started: list[Agents], tmp_path: Path) -> None:
    """The node of rank 0 is lost and the other goes on; it comes back and takes part again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*COMMON, "TRAIN.DURATION", "100step"]
    # As docs/clusters.md says: with a store that is shared, torchrun takes no new node in.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "LAUNCHER_TEST_SLEEP_ALONE": "0.3"}
    agents = Agents("1:2", [*args, "OUTPUT_DIR", run], **env)
    started.append(agents)
    stays, goes = agents.start(2, host=True), agents.start(1)
    wait_for_step(run, 5, stays)
    goes.kill()
    wait_for(run, "resume", 1, agents)
    wait_for_step(run, 8, stays)
    comes = agents.start(1)
    for job in (stays, comes):
        job.wait(120).ok()
    history = jobs.history(run)
    begun = [record for record in history if record["event"] in ("start", "resume")]
    assert [record["world_size"] for record in begun] == [2, 1, 2]
    # torchrun ended the lone rank as anyone ends a run, so nothing was lost there.
    (stop,) = (record for record in history if record["event"] == "stop")
    assert stop["step"] == begun[2]["step"]
    jobs.train(*args, "OUTPUT_DIR", whole, ranks=2, env=ONE_THREAD).ok()
    assert_like(run, whole, exactly=False)


@pytest.mark.parametrize(
    ("args", "told"),
    [(["OPTIM.LRR", "1"], "did you mean OPTIM.LR?"), ([], "already holds a run")],
    ids=["config", "directory"],
)
def test_a_mistake_stays_one(args: list[str], told: str, tmp_path: Path) -> None:
    """torchrun's next try, which implies --resume, does not go on with a run that was refused."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    before = jobs.snapshot(run)
    options = ["--max-restarts=1"]
    ended = jobs.train(*COMMON, *args, "OUTPUT_DIR", run, ranks=2, options=options, timeout=60)
    assert ended.code == 1 and ended.err.count(told) == 2
    assert jobs.snapshot(run) == before
