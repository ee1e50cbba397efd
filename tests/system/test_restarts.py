"""torchrun starts a failed run again: with several agents, with fewer and with more ranks (issue 5,
item 3)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system import jobs
from tests.system.exact import records
from tests.system.test_failures import COMMON

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Agents(ExitStack):
    """torchruns of one job on one machine, one for each node; leave the block to end them."""

    def __init__(self, nodes: str, args: list[Any], **env: str) -> None:
        super().__init__()
        self.nodes, self.args, self.env = nodes, args, ONE_THREAD | env
        self.port = jobs.free_port()

    def start(self, node: int, host: bool = False) -> jobs.Running:
        """Nodes are numbered by their addresses, so that of the lower one has the lower ranks."""
        conf = f"is_host={int(host)},keep_alive_interval=1,keep_alive_max_attempt=5"
        torchrun = [
            *(*jobs.TORCHRUN, f"--nnodes={self.nodes}", "--nproc-per-node=1", "--max-restarts=3"),
            *("--rdzv-id=job", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--rdzv-backend=c10d"),
            *(f"--local-addr=127.0.0.{node}", f"--rdzv-conf={conf},last_call_timeout=1"),
        ]
        return self.enter_context(jobs.Job([*torchrun, jobs.TRAIN, *self.args], self.env))


def assert_like(run: Path, reference: Path, exactly: bool) -> None:
    """The same weights, and each step's record once."""
    assert jobs.status(run)["state"] == "completed"
    ours, theirs = (jobs.state(path)["model"] for path in (run, reference))
    for name, tensor in theirs.items():
        if exactly:
            assert torch.equal(ours[name], tensor)
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    keys = [(record["step"], *sorted(record)) for record in jobs.metrics(run)]
    assert keys == [(record["step"], *sorted(record)) for record in jobs.metrics(reference)]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_of_two_agents(rank: int, tmp_path: Path) -> None:
    """Each torchrun starts its rank again, in whichever order; the same bits in the end."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    once = ["TASK.FAILURE", "kill", "TASK.RANK", rank, "TASK.ONCE", tmp_path / "x", "TASK.AT", "8"]
    with Agents("2", [*COMMON, *once, "OUTPUT_DIR", run]) as agents:
        for job in [agents.start(1, host=True), agents.start(2)]:
            job.wait(120).ok()
    assert len(jobs.history(run, "resume")) == 1
    jobs.train(*COMMON, "OUTPUT_DIR", whole, ranks=2, env=ONE_THREAD).ok()
    assert_like(run, whole, exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [0, 4])
def test_fewer_and_more_nodes(shards: int, tmp_path: Path) -> None:
    """The node of rank 0 is lost and the other goes on; it comes back and takes part again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*COMMON, "TRAIN.DURATION", "100step", "TRAIN.SHARDS", shards]
    # As docs/clusters.md says: with a store that is shared, torchrun takes no new node in.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "LAUNCHER_TEST_SLEEP_ALONE": "0.3"}
    with Agents("1:2", [*args, "OUTPUT_DIR", run], **env) as agents:
        stays, goes = agents.start(2, host=True), agents.start(1)
        jobs.wait_for_step(run, 5, stays)
        goes.kill()
        stays.until(lambda: sizes(run) == [2, 1], "a resume with one rank")
        jobs.wait_for_step(run, 8, stays)
        comes = agents.start(1)
        for job in (stays, comes):
            job.wait(120).ok()
    assert sizes(run) == [2, 1, 2]
    # torchrun ended the lone rank as anyone ends a run, so nothing was lost there.
    (stop,) = jobs.history(run, "stop")
    assert stop["step"] == jobs.history(run, "resume")[1]["step"]
    jobs.train(*args, "OUTPUT_DIR", whole, ranks=2, env=ONE_THREAD).ok()
    assert_like(run, whole, exactly=shards > 0)
    if shards:
        assert records(run) == records(whole)


def sizes(run: Path) -> list[int]:
    """How many ranks each attempt had."""
    return [record["world_size"] for record in jobs.history(run, "start", "resume")]
