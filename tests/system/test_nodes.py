"""Runs over several nodes: a whole one, a node that is lost, a cable that is pulled (issue 5, item
7)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.system import jobs
from tests.system.exact import COMMON, assert_same
from tests.system.jobs import slow, wait_for_step
from tests.system.nodes import Cluster, missing
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(missing() != "", reason=missing())

TIMEOUT_S = 4
ARGS = [*COMMON, "DATALOADER.NUM_WORKERS", "0", "DIST.TRAIN_TIMEOUT", f"{TIMEOUT_S}s"]
# As many threads a rank as when all of them share one node: sums depend on it.
ENV = {"OMP_NUM_THREADS": "1"}
SLOWLY = {**ENV, "LAUNCHER_TEST_SLEEP": "0.1"}
# Contract, invariant 8: 40 s after the timeout; the rest is for a machine that is busy.
BOUND_S = TIMEOUT_S + 40 + 30
# A short wait for nodes that are not coming back.
ELASTIC = ",last_call_timeout=2"
# Or torchrun's on nodes that are left keep the address of a first node that is gone
# (https://github.com/pytorch/pytorch/issues/135712).
UNSHARED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of so many ranks on one node, never interrupted."""
    done: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in done:
            done[ranks] = tmp_path_factory.mktemp("whole") / "run"
            jobs.train(*ARGS, "OUTPUT_DIR", done[ranks], ranks=ranks, env=ENV).ok()
        return done[ranks]

    return make


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """As many nodes as the test's parameter says, by default two."""
    with Cluster(getattr(request, "param", 2), tmp_path) as made:
        yield made


on_nodes = partial(pytest.mark.parametrize, indirect=["cluster"])


@on_nodes(
    ("cluster", "ranks", "store"),
    [
        slow(2, 1, 0, id="2 nodes"),
        slow(3, 1, 2, id="3 nodes"),
        slow(2, 2, 1, id="2 nodes of 2 ranks"),
    ],
)
def test_many_nodes_train_what_one_does(
    cluster: Cluster, ranks: int, store: int, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    """Bit for bit; wherever the rendezvous is kept."""
    run = tmp_path / "run"
    started = cluster.torchrun(*ARGS, "OUTPUT_DIR", run, ranks=ranks, store=store, env=ENV)
    ended = [job.wait(120).ok() for job in started]
    world = ranks * len(cluster.nodes)
    assert_same(run, whole(world))
    assert sorted(p.name for p in (run / "logs").iterdir()) == [
        f"rank{rank}.log" for rank in range(world)
    ]
    for rank in range(world):
        assert f"rank {rank} of {world}" in (run / f"logs/rank{rank}.log").read_text()
    hosts = [rank["host"] for rank in jobs.environment(run)["ranks"]]
    assert hosts == [node.name for node in cluster.nodes for _ in range(ranks)]
    told = "".join(job.output for job in ended)
    assert told.count(f"rank 0 of {world}") == 1 and told.count("done: 28 steps") == 1


def strike(cluster: Cluster, how: str, victim: int) -> None:
    if how == "kill":
        cluster.nodes[victim].end()
    else:
        cluster.nodes[victim].cut()


@on_nodes(
    ("cluster", "how", "victim", "store"),
    [
        pytest.param(2, "cut", 1, 0, id="2 nodes, cut"),
        slow(2, "kill", 0, 0, id="2 nodes, killed with rank 0 and the store"),
        slow(2, "kill", 1, 0, id="2 nodes, killed"),
        slow(2, "cut", 0, 0, id="2 nodes, cut from the store"),
        slow(2, "cut", 0, 1, id="2 nodes, rank 0 cut"),
        slow(3, "cut", 2, 1, id="3 nodes, cut"),
        slow(3, "cut", 0, 0, id="3 nodes, rank 0 and store cut"),
        slow(3, "cut", 0, 1, id="3 nodes, rank 0 cut"),
        slow(3, "kill", 0, 1, id="3 nodes, rank 0 killed"),
    ],
)
def test_a_lost_node_ends_the_run_which_then_resumes(
    cluster: Cluster,
    how: str,
    victim: int,
    store: int,
    whole: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """Told truthfully and once, within the timeout; and the same command goes on exactly."""
    run, world = tmp_path / "run", len(cluster.nodes)
    started = cluster.torchrun(*ARGS, "OUTPUT_DIR", run, store=store, env=SLOWLY)
    wait_for_step(run, 9, started[0])
    assert all(len(node.ranks()) == 1 for node in cluster.nodes)
    struck = time.time()
    strike(cluster, how, victim)
    # The ranks of every node end by themselves. A torchrun that is cut off from its store ends when
    # TCP gives up, after a quarter of an hour: see docs/clusters.md.
    cut = {victim} if how == "cut" and victim != store else set()
    cut |= set(range(world)) - {store} if how == "cut" and victim == store else set()
    for number in set(range(world)) - cut:
        assert started[number].wait(BOUND_S).code != 0
    for number in cut:
        wait_until(lambda n=number: not cluster.nodes[n].ranks(), BOUND_S, "the end of its ranks")
    told = jobs.failure(run)
    assert struck < told["time"] < struck + BOUND_S
    assert len(jobs.history(run, "failure")) == 1 and jobs.status(run)["state"] == "failed"
    # With two nodes and no store in common, each side can only name the other.
    assert told["rank"] == victim or (world == 2 and how == "cut" and told["rank"] == 1 - victim)
    assert told["host"] == f"node{told['rank']}" and "no sign of life" in told["exception"]

    if how == "kill":
        cluster.replace(victim)
    else:
        cluster.nodes[victim].join()
        for number in cut:
            assert started[number].wait(BOUND_S).code != 0
    assert len(jobs.history(run, "failure")) == 1
    for job in cluster.torchrun(*ARGS, "--resume", "OUTPUT_DIR", run, store=store, env=ENV):
        job.wait(120).ok()
    assert_same(run, whole(world))
    (resume,) = jobs.history(run, "resume")
    assert resume["step"] >= 8


@on_nodes(
    ("cluster", "how", "victim", "store"),
    [
        slow(2, "kill", 1, 0, id="2 nodes, killed"),
        slow(2, "cut", 1, 0, id="2 nodes, cut"),
        slow(2, "cut", 0, 1, id="2 nodes, rank 0 cut"),
        slow(3, "cut", 2, 0, id="3 nodes, cut"),
        slow(3, "kill", 0, 1, id="3 nodes, rank 0 killed"),
    ],
)
def test_the_nodes_that_are_left_go_on(
    cluster: Cluster, how: str, victim: int, store: int, tmp_path: Path
) -> None:
    """--nnodes=N-1:N with --max-restarts; nothing is written by both sides of a cut."""
    run, world = tmp_path / "run", len(cluster.nodes)
    started = cluster.torchrun(
        *ARGS,
        *("OUTPUT_DIR", run, "DIST.INIT_TIMEOUT", "20s"),
        nodes=f"{world - 1}:{world}",
        store=store,
        options=["--max-restarts=3"],
        conf=ELASTIC,
        env={**SLOWLY, **(UNSHARED if world > 2 else {})},
    )
    wait_for_step(run, 9, started[0])
    strike(cluster, how, victim)
    left = [job for number, job in enumerate(started) if number != victim]
    for job in left:
        job.wait(BOUND_S + 60).ok()
    if how == "cut":
        cluster.nodes[victim].join()
        started[victim].wait(BOUND_S + 60)
    assert jobs.status(run)["state"] == "completed"
    assert list(jobs.values(run, "train/loss")) == [*range(3, 28, 3), 28]
    jobs.assert_once(run)
    begun = jobs.history(run, "start", "resume")
    assert [record["world_size"] for record in begun] == [world, world - 1]
    assert jobs.history(run, "finish")[-1] == jobs.history(run)[-1]


@pytest.mark.slow
def test_a_host_name_that_leads_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    """As Debian writes it into /etc/hosts: gloo takes that address, and is told which to take."""
    cluster.hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node0 node1\n")
    for node in cluster.nodes:
        node.network = {}
    words = [*ARGS, "OUTPUT_DIR", tmp_path / "run", "DIST.INIT_TIMEOUT", "20s"]
    ended = [job.wait(BOUND_S + 40) for job in cluster.torchrun(*words, env=ENV)]
    assert all(job.code != 0 for job in ended)
    assert "Set GLOO_SOCKET_IFNAME" in "".join(job.err for job in ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_srun_over_two_nodes(
    cluster: Cluster, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    """Without torchrun: Slurm's variables, and rank 0's node by the first name of its list."""
    run = tmp_path / "run"
    job_id = jobs.slurm_job()
    step = {
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[0-1]"},
        **{"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": job_id, "SLURM_LOCALID": "0"},
    }
    for number, node in enumerate(cluster.nodes):
        place = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number)}
        command = [sys.executable, jobs.TRAIN, *ARGS, "OUTPUT_DIR", run]
        cluster.jobs.append(node.start(*command, env={**ENV, **step, **place}))
    for job in cluster.jobs:
        job.wait(120).ok()
    assert_same(run, whole(2))
    environment = jobs.environment(run)
    assert environment["job"] == job_id and environment["launched_by"] == "srun"
    assert [rank["host"] for rank in environment["ranks"]] == ["node0", "node1"]


def pod(name: str) -> tuple[str, dict[str, str]]:
    """The script and the environment of the Kubernetes job in docs/clusters.md."""
    text = (jobs.ROOT / "docs/clusters.md").read_text()
    manifest = text.partition("```yaml\n")[2].partition("```")[0]
    _, job = yaml.safe_load_all(manifest)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["PET_RDZV_ENDPOINT"].startswith(f"{name}-0.{name}:")
    return container["command"][2], env


@pytest.mark.slow
def test_the_kubernetes_job(cluster: Cluster, whole: Callable[[int], Path], tmp_path: Path) -> None:
    """Its script, as two pods run it: one is asked to stop, both exit 75, and their replacements
    go on."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    tree: dict[str, Any] = {}
    for key, value in zip(ARGS[::2], ARGS[1::2], strict=True):
        room, name = key.split(".")
        tree.setdefault(room, {})[name] = value
    config.write_text(yaml.safe_dump(tree))
    script, env = pod("train")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env |= {**SLOWLY, "RUN": str(run), "CONFIG": str(config), "PATH": path}
    env |= {"PET_NPROC_PER_NODE": "1", "PET_RDZV_ENDPOINT": "node0:29400"}

    def pods(**more: str) -> list[jobs.Job]:
        started = [
            node.start("bash", "-c", script, env={**env, "JOB_COMPLETION_INDEX": str(n), **more})
            for n, node in enumerate(cluster.nodes)
        ]
        cluster.jobs += started
        return started

    first = pods()
    wait_for_step(run, 6, first[0])
    shell = psutil.Process(first[1].pid).children()[0]
    shell.terminate()
    ended = [job.wait(60) for job in first]
    assert [job.code for job in ended] == [75, 75], "".join(job.output for job in ended)
    assert jobs.status(run)["state"] == "stopped"
    second = [job.wait(120) for job in pods(LAUNCHER_TEST_SLEEP="0")]
    assert [job.code for job in second] == [0, 0], "".join(job.output for job in second)
    assert_same(run, whole(2))
