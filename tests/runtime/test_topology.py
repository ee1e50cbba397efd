"""Which rank this process is: torchrun's variables, an srun step's, or none."""

import pytest

from launcher.errors import UsageError
from launcher.runtime.topology import Topology, first_host, read_topology, tasks_per_node


def environ(text: str) -> dict[str, str]:
    return dict(variable.split("=") for variable in text.split())


TORCHRUN = environ(
    "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 "
    "MASTER_ADDR=node0 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=job7"
)
# Rank 4 of 7: four nodes with 1, 2, 2 and 2 tasks.
SRUN = environ(
    "SLURM_PROCID=4 SLURM_LOCALID=1 SLURM_NODEID=2 SLURM_STEP_NUM_TASKS=7 SLURM_JOB_ID=1234567 "
    "SLURM_STEP_TASKS_PER_NODE=1,2(x3) SLURM_STEP_NODELIST=gpu[07-09,12]"
)


def refusal(env: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        read_topology(env)
    assert caught.value.exit_code == 2
    return str(caught.value)


AT_NODE0 = Topology(5, 1, 8, 4, "torchrun", master_addr="node0", master_port=29500, job_id="job7")
AT_GPU07 = Topology(4, 1, 7, 2, "srun", master_addr="gpu07", master_port=34567, job_id="1234567")


STARTS = {
    "torchrun": (TORCHRUN, AT_NODE0),
    "torchrun in an srun step": (SRUN | TORCHRUN, AT_NODE0),
    "one node may leave LOCAL_WORLD_SIZE out": (
        environ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost"),
        Topology(1, 1, 2, 2, "torchrun", master_addr="localhost"),
    ),
    "srun": (SRUN, AT_GPU07),
    "plain python": ({}, Topology()),
    "plain python in an sbatch script": (
        environ("SLURM_JOB_ID=1 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0"),
        Topology(),
    ),
}


@pytest.mark.parametrize(("env", "topology"), STARTS.values(), ids=STARTS)
def test_who_started_this_process_and_as_which_rank(
    env: dict[str, str], topology: Topology
) -> None:
    found = read_topology(env)
    assert found == topology
    alone = topology.launched_by == "python"  # in these cases rank 0, too
    assert (found.is_main, found.distributed) == (alone, not alone)


def test_ranks_without_an_address_are_refused() -> None:
    env = {key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}
    assert "MASTER_ADDR" in refusal(env)


def test_ranks_of_a_step_agree_on_the_address_and_jobs_differ_in_the_port() -> None:
    def at(**changes: str) -> tuple[str, int]:
        topology = read_topology({**SRUN, **changes})
        return topology.master_addr, topology.master_port

    other_rank = {"SLURM_PROCID": "6", "SLURM_NODEID": "3", "SLURMD_NODENAME": "gpu12"}
    assert at() == at(**other_rank)
    assert at()[1] != at(SLURM_JOB_ID="1234568")[1]
    assert 1024 < at()[1] < 65536
    assert at(MASTER_ADDR="10.0.0.1", MASTER_PORT="4000") == ("10.0.0.1", 4000)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("more", ["", "{name}="], ids=["missing", "empty"])
def test_a_torchrun_variable_that_is_not_set_is_named(name: str, more: str) -> None:
    env = {key: value for key, value in TORCHRUN.items() if key != name}
    assert refusal(env | environ(more.format(name=name))).startswith(f"{name} is not set")


TORCHRUN_NUMBERS = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
SRUN_NUMBERS = [*(name for name in SRUN if name != "SLURM_STEP_NODELIST"), "MASTER_PORT"]


@pytest.mark.parametrize("value", ["two", "1.5"])
@pytest.mark.parametrize(
    ("env", "name"),
    [(TORCHRUN, name) for name in TORCHRUN_NUMBERS] + [(SRUN, name) for name in SRUN_NUMBERS],
)
def test_a_variable_that_is_no_number_is_named(env: dict[str, str], name: str, value: str) -> None:
    assert refusal({**env, name: value}).startswith(f"{name}={value!r} is not")


@pytest.mark.parametrize(
    ("env", "variable"),
    [
        (TORCHRUN, "RANK=8"),
        (TORCHRUN, "RANK=-1"),
        (TORCHRUN, "WORLD_SIZE=0"),
        (TORCHRUN, "LOCAL_RANK=4"),
        (TORCHRUN, "LOCAL_WORLD_SIZE=9"),
        (SRUN, "SLURM_PROCID=7"),
        (SRUN, "SLURM_LOCALID=2"),
        (SRUN, "SLURM_STEP_NODELIST="),
    ],
)
def test_contradictions_name_the_variable(env: dict[str, str], variable: str) -> None:
    assert variable in refusal(env | environ(variable))


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8]), ("3(x1)", [3])],
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "2(x", "two", "2,,1", "2(3)"])
def test_tasks_per_node_of_nonsense(text: str) -> None:
    with pytest.raises(UsageError, match="SLURM_STEP_TASKS_PER_NODE"):
        tasks_per_node(text)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("localhost", "localhost"),
        ("a1,a2", "a1"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("tux-[1-2]-ib", "tux-1-ib"),
        ("x1,gpu[07-09]", "x1"),
        ("rack[2-3]node[04-05]", "rack2node04"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_person_reads_where_a_rank_is() -> None:
    assert str(read_topology(TORCHRUN)) == (
        "rank 5 of 8 (local rank 1 of 4, 2 nodes, started by torchrun)"
    )
