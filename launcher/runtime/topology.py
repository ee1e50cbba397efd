"""Which rank of how many this process is, read from the environment; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """The place of this process among the ranks of its run.

    `launched_by` is "torchrun", "srun" or "python"; only the first two make a process group.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched_by: str = "python"
    master_addr: str = ""
    master_port: int = 0
    job_id: str = ""  # stays the same over the restarts of a job; "" where nobody restarts
    restarts: int = 0  # by Slurm
    retries: int = 0  # by torchrun, that this node knows of

    @property
    def distributed(self) -> bool:
        return self.launched_by != "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        nodes = max(1, self.world_size // max(1, self.local_world_size))
        return (
            f"rank {self.rank} of {self.world_size} (local rank {self.local_rank} of "
            f"{self.local_world_size}, {nodes} node{'s' * (nodes > 1)}, started by "
            f"{self.launched_by})"
        )


# Rank, local rank, world size and local world size, as the two starters name them.
NAMES = {
    "torchrun": "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE",
    "srun": "SLURM_PROCID SLURM_LOCALID SLURM_STEP_NUM_TASKS SLURM_STEP_TASKS_PER_NODE",
}


def read_topology(env: Mapping[str, str]) -> Topology:
    """Read torchrun's variables, else those of an srun step, else one process on its own.

    Raises UsageError when the variables are incomplete or contradict each other.
    Sources: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables and
    https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES.
    """
    if "RANK" in env or "WORLD_SIZE" in env or "LOCAL_RANK" in env:
        topology = _from_torchrun(env)
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        # The STEP variable exists only inside an srun step: a plain `python` in a batch script
        # also sees SLURM_NTASKS, and would wait for ever for ranks that nobody started.
        topology = _from_slurm(env)
    else:
        return Topology(restarts=_number(env, "SLURM_RESTART_COUNT", 0))
    rank, local, world, local_world = NAMES[topology.launched_by].split()
    fits = 0 <= topology.local_rank < topology.local_world_size <= topology.world_size
    if not (fits and 0 <= topology.rank < topology.world_size):
        raise UsageError(
            f"{rank}={topology.rank}, {world}={topology.world_size}, {local}={topology.local_rank} "
            f"and {local_world}={topology.local_world_size} contradict each other: ranks count "
            f"from 0. Start the run with {topology.launched_by}, which sets them all."
        )
    if not topology.master_addr:
        raise UsageError(
            "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot find each other. Start "
            "the run with torchrun, which sets them."
        )
    return topology


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or default
    if text is None:
        raise UsageError(
            f"{name} is not set though other variables of a distributed run are (RANK, WORLD_SIZE, "
            "LOCAL_RANK). Start the run with torchrun, or unset them to run one process."
        )
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} is not a whole number.") from None


def _from_torchrun(env: Mapping[str, str]) -> Topology:
    world_size = _number(env, "WORLD_SIZE")
    job_id, port = env.get("TORCHELASTIC_RUN_ID", ""), _number(env, "MASTER_PORT", 0)
    if job_id in ("", "none"):
        # No --rdzv-id: torchrun's own store lives, on a port of its own, as long as the job.
        shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        job_id = f"{env.get('MASTER_ADDR', '')}:{port}" if shared else ""
    return Topology(
        rank=_number(env, "RANK"),
        local_rank=_number(env, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", world_size),
        launched_by="torchrun",
        master_addr=env.get("MASTER_ADDR", ""),
        master_port=port,
        job_id=job_id,
        restarts=_number(env, "SLURM_RESTART_COUNT", 0),
        retries=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _from_slurm(env: Mapping[str, str]) -> Topology:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS")
    node = _number(env, "SLURM_NODEID", 0)
    tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    # Every rank must find rank 0's node by itself. srun tells the address it was launched from,
    # which need not be in the job; the first name of the node list is rank 0's node.
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
    # One port a job, the same on every rank, apart from those of jobs on the same node.
    port = _number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000)
    return Topology(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=tasks[node] if node < len(tasks) else world_size,
        launched_by="srun",
        master_addr=address,
        master_port=port,
        job_id=env.get("SLURM_JOB_ID", ""),
        restarts=_number(env, "SLURM_RESTART_COUNT", 0),
    )


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's notation: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not in Slurm's notation.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "gpu[07-09,12],x1" gives "gpu07"."""
    # Up to the first comma outside brackets.
    match = re.match(r"(?:[^,\[\]]+|\[\w[^\]]*\])+", nodelist)
    if match is None or match[0].startswith("["):
        raise UsageError(f"SLURM_STEP_NODELIST={nodelist!r} names no host.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])
