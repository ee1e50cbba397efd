"""The doctor's checks: what is planted is found, with its name, and nothing else is."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import load_config
from launcher.data.splits import Data
from launcher.debug.doctor import limits, needs, ranks, variables
from launcher.debug.doctor.attempt import attempt, tensors_of
from launcher.debug.doctor.builds import builds, devices
from launcher.debug.doctor.determinism import determinism
from launcher.debug.doctor.examine import examine
from launcher.debug.doctor.findings import Finding, Machine, Topic, driver
from launcher.debug.doctor.operators import digest, row_digests, sums
from launcher.engine.run import Job
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.memory import MemoryBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory
from tests.debug import planted

GIB = 2**30
ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(4, 4, 4, "all CPUs of the host"))
HERE = Machine(
    environ={},
    cpu=ALONE.cpu,
    memory=MemoryBudget(8 * GIB, 4 * GIB, False, "free memory"),
    open_files=65536,
    interfaces=frozenset({"lo", "eth0"}),
    temporary=Path("/tmp"),
    free=lambda folder: 100 * GIB,
)
MOST = "on ranks 0-1, 3 (a, b)"
TORCHRUN = {"rank": 0, "world_size": 4, "local_world_size": 4, "launched_by": "torchrun"}


def job(task: type, *words: object, directory: str = "never made") -> Job:
    """What the command makes of a config."""
    words = ("TRAIN.BATCH_SIZE", 8, "DATALOADER.NUM_WORKERS", 0, "DIST.DEVICE", "cpu", *words)
    found = load_config(None, [*map(str, words), "TASK.NAME", "x"], lambda *_: task)
    return Job(found.cfg, task, RunDirectory(directory))


def only(findings: Any, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def repeated(task: type, *words: object) -> Finding:
    (found,) = determinism(job(task, *words), ALONE, 3)
    return found


def line_with(text: str) -> str:
    """Where the planted tasks have a line, as a finding names it."""
    lines = Path(planted.__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return f"{planted.__file__}:{number} in "


@pytest.mark.parametrize("task", [planted.Steady, planted.TwoPhases, planted.FillsItself])
def test_first_steps_that_are_repeatable(task: type) -> None:
    found = repeated(task, "TRAIN.MICRO_BATCH_SIZE", 3)
    assert (found.state, found.found) == (
        "ok",
        "3 steps, twice from the same seed: equal bit for bit",
    )


@pytest.mark.parametrize(
    ("task", "words", "told"),
    [
        (
            planted.FromOutside,
            "aten.mul.Tensor in the forward pass of 2.1 (Noisy)",
            ("return x * (1.0 + noise)", "no operator of torch made that"),
        ),
        (
            planted.OwnGenerator,
            "aten.rand.generator in the forward pass of 2 (Unseeded)",
            ("x + torch.rand(x.shape", "draws from a generator that is in another state"),
        ),
        (
            planted.InBackward,
            "aten.mul.Tensor in the backward pass of 2 (Straight)",
            ("return gradient * (1 +", "no operator of torch made that"),
        ),
        (
            planted.Itself,
            "planted.jitter.default in the forward pass of 2 (Jitter)",
            ("return jitter(x)", "Its result from the same input is another each time"),
        ),
        (
            planted.OtherWay,
            "aten.tanh.default in the forward pass of 2 (Turns)",
            ("return torch.relu(x) if", "The other run had aten.relu.default there"),
        ),
    ],
)
def test_the_first_operator_that_differs_is_named(
    task: type, words: str, told: tuple[str, str]
) -> None:
    planted.OtherWay.runs = 0
    found = repeated(task)
    assert found.state == "problem"
    assert f"the first operator that differs: {words}, at {line_with(told[0])}" in found.found
    assert told[1] in found.found
    assert "in step 1" in found.found
    assert found.remedy


def test_the_line_of_the_forward_pass_is_told_of_a_backward_operator() -> None:
    """torch's own nodes have no Python line in a backward pass."""

    class Task(planted.Steady):
        def train_step(self, model: Any, batch: Any) -> Any:
            hidden = model[0](batch.x)
            hidden.register_hook(lambda g: g + torch.from_numpy(NOISE.pop().copy()))
            return {"loss": torch.tanh(hidden).square().mean()}

    NOISE = [torch.full((8, 8), float(i)).numpy() for i in range(20)]
    found = attempt(job(Task), ALONE, 1, 0)
    backward = [e for e in found.events if e.stage == "backward"]
    assert any(e.name.startswith("aten.tanh_backward") and e.forward for e in backward)
    assert "in the backward pass" in repeated(Task).found


@pytest.mark.parametrize(
    ("task", "module"), [(planted.ReadsEmpty, "2"), (planted.ReadsAfterFilling, "2.1")]
)
def test_memory_that_is_read_before_it_is_written(task: type, module: str) -> None:
    found = repeated(task)
    assert found.state == "problem"
    assert "torch.empty" in found.found
    assert f"aten.nan_to_num.default in the forward pass of {module} (Uninit" in found.found
    assert line_with("return x + left.nan_to_num") in found.found


def test_a_batch_that_differs_is_told_before_the_model() -> None:
    found = repeated(planted.DataDiffers)
    assert found.state == "problem"
    assert "the batch differs first, in step" in found.found
    assert re.search(r"from the data set or collate: samples? (5|17)", found.found)
    assert "operator" not in found.found


def test_an_order_that_differs() -> None:
    found = repeated(planted.OrderDiffers, "TRAIN.SAMPLER", "dataset")
    assert "the order of the samples differs first, in step 1" in found.found


def test_a_model_that_is_built_otherwise() -> None:
    found = repeated(planted.BuiltDiffers)
    assert found.found == "build_model gives other weights from the same seed: 3.weight"


def test_numbers_that_change_behind_the_operators() -> None:
    found = repeated(planted.BehindTorch)
    assert found.state == "problem"
    assert found.found.startswith("weights differ in step 1; the first operator that differs: ")
    assert "in step 2. What it takes differs already, and no operator of torch" in found.found


def test_steps_that_fail_are_a_problem() -> None:
    found = repeated(planted.Fails)
    assert (found.state, found.found) == ("problem", "ValueError: no such luck")


def test_the_share_of_a_rank_of_many_needs_no_other_rank() -> None:
    class Together(planted.Steady):
        def train_step(self, model: Any, batch: Any) -> Any:
            return {"loss": self.gather(model(batch.x)).square().mean()}

    runtime = dataclasses.replace(ALONE, topology=Topology(0, 0, 5, 5))
    (found,) = determinism(job(Together), runtime, 4)
    assert found.state == "ok"
    assert found.found.endswith("(rank 0's share of 5, nothing exchanged)")


def test_nothing_is_left_switched_on() -> None:
    hooks = torch.nn.modules.module._global_forward_hooks
    before = len(hooks), torch.is_anomaly_enabled()
    repeated(planted.Steady)
    assert (len(hooks), torch.is_anomaly_enabled()) == before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.float64, torch.bool]
)
def test_a_digest_tells_bits_and_places_apart(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(1)
    tensor = (torch.randn(5, 7, generator=made).clamp(0) * 9).to(dtype)
    other = tensor.clone()
    other[2, 3] = ~other[2, 3] if dtype is torch.bool else other[2, 3] + 1
    for one in (row_digests, sums):
        differs = [a != b for a, b in zip(one(tensor), one(other), strict=True)]
        assert differs == [False, False, True, False, False]
        assert one(tensor.flip(1)) != one(tensor)
        assert one(tensor.t().contiguous().t()) == one(tensor)
    assert digest(tensor) == digest(tensor.clone()) != digest(other)


def test_tensors_and_arrays_are_found_in_a_batch_of_any_class() -> None:
    batch = {"a": planted.Batch(torch.ones(2, 3), torch.zeros(())), "b": [torch.ones(2).numpy()]}
    assert len(tensors_of(batch)) == 3


# What the config needs.


def loaders(workers: int, batch: int = 64 * 2**20, tensors: int = 4) -> needs.Loaders:
    return needs.Loaders("train", workers, 2, batch, tensors)


def test_a_too_small_shm_is_named_with_sizes_and_remedy() -> None:
    little = dataclasses.replace(HERE, memory=MemoryBudget(GIB, 64 * 2**20, False, "free memory"))
    found = needs.shared_memory([loaders(4)], little, ranks=2)
    assert found.state == "problem"
    assert "needs 1.00 GiB for 2 ranks" in found.found
    assert "(train: 4 workers x 2 batches of 64.0 MiB), 64.0 MiB free" in found.found
    assert "--shm-size" in found.remedy and "DATALOADER.NUM_WORKERS" in found.remedy
    assert needs.shared_memory([loaders(4)], HERE, ranks=2).state == "ok"
    assert needs.shared_memory([loaders(0)], little, ranks=2).state == "ok"
    # Those of an evaluation come beside those of the training.
    assert needs.shared_memory([loaders(16)], HERE, ranks=2).state == "ok"
    assert needs.shared_memory([loaders(16), loaders(1)], HERE, ranks=2).state == "problem"


def test_too_few_files_for_the_loaders() -> None:
    few = dataclasses.replace(HERE, open_files=256)
    assert needs.files([loaders(32, tensors=4)], few).state == "problem"
    assert needs.files([loaders(32, tensors=4)], HERE).state == "ok"
    assert needs.files([loaders(32)], dataclasses.replace(HERE, open_files=-1)).state == "ok"


def test_a_too_small_disk_is_named_with_sizes_and_remedy(tmp_path: Path) -> None:
    found = needs.disk(tmp_path, 30 * GIB, 4, HERE)
    assert found.state == "problem"
    assert "needs 120.00 GiB for 4 of 30.00 GiB, one being written; 100.00 GiB free" in found.found
    assert "OUTPUT_DIR" in found.remedy and "KEEP_LAST" in found.remedy
    assert needs.disk(tmp_path, 24 * GIB, 4, HERE).state == "ok"
    assert needs.disk(tmp_path, None, 4, HERE).state == "warning"
    # Old checkpoints make room as they are replaced.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/state.pt").write_bytes(b"." * 2**20)
    exactly = dataclasses.replace(HERE, free=lambda folder: 7 * 2**20)
    assert needs.disk(tmp_path, 2 * 2**20, 4, exactly).state == "ok"
    assert needs.disk(tmp_path, 2 * 2**20 + 1, 4, exactly).state == "problem"


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("TRAIN.DURATION", "10ep"), 4),
        (("CHECKPOINT.KEEP_BEST", 0), 3),
        (("EVAL.EVERY", ""), 3),
        (("CHECKPOINT.KEEP_EVERY", "2ep"), 9),
        (("TRAIN.DURATION", "1ep"), 2),
        (("TRAIN.DURATION", "1ep", "CHECKPOINT.EVERY", "1step"), 4),
        (("TRAIN.DURATION", "1ep", "CHECKPOINT.EVERY", "5s"), 4),
    ],
)
def test_how_many_checkpoints_lie_side_by_side(words: Any, count: int) -> None:
    one = job(planted.Steady, *words)
    data = Data(one.cfg, planted.Steady(one.cfg), ALONE, lambda phase: None)
    assert needs.checkpoints_kept(one.cfg, data) == count


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 3), ("sgd", 2)])
def test_a_checkpoint_holds_weights_and_states(optimizer: str, copies: int) -> None:
    one = job(planted.Steady, "OPTIM.NAME", optimizer)
    found = list(needs.needs(one, ALONE, HERE, Path()))
    weights = sum(p.numel() for p in planted.Steady(one.cfg).build_model().parameters()) * 4
    match = re.search(r"for 4 of (\d+) bytes", only(found, "disk for checkpoints").found)
    assert match is not None
    assert copies * weights <= int(match[1]) <= copies * weights + 64  # AdamW counts its steps


def test_workers_that_memory_takes_away_are_a_warning() -> None:
    """Where a run chooses them, it takes as many as fit: that is no problem, but slow."""
    little = dataclasses.replace(HERE, memory=MemoryBudget(8 * GIB, 600, False, ""))
    one = job(planted.Steady, "DATALOADER.NUM_WORKERS", -1)
    found = list(needs.needs(one, ALONE, little, Path()))
    assert only(found, "loaders").state == "warning"
    assert "by its CPUs it would be 2" in only(found, "loaders").found
    assert only(found, "/dev/shm for loaders").state == "ok"


def test_what_cannot_be_built_is_a_problem() -> None:
    class Broken(planted.Steady):
        def build_dataset(self, split: str) -> Any:
            raise FileNotFoundError(f"no images of {split}")

    (found,) = needs.needs(job(Broken), ALONE, HERE, Path())
    assert (found.state, found.found) == ("problem", "FileNotFoundError: no images of train")


# The machine.


@pytest.mark.parametrize(
    ("changed", "name", "state", "told"),
    [
        ({"memory": MemoryBudget(GIB, 2**26, False, "")}, "/dev/shm", "warning", "64.0 MiB"),
        ({"memory": MemoryBudget(GIB, None, True, "free memory")}, "memory", "warning", "swaps"),
        ({"memory": MemoryBudget(GIB, None, False, "free memory")}, "/dev/shm", "ok", "none"),
        ({"open_files": 512}, "open files", "warning", "512"),
        ({"open_files": -1}, "open files", "ok", "no limit"),
        ({"free": lambda folder: 2**20}, "OUTPUT_DIR", "warning", "1.0 MiB"),
        ({"clock": lambda: 1e9}, "clock", "problem", "2001"),
        ({"modified": lambda folder: time.time() + 9}, "clock", "warning", "ahead"),
        ({"modified": lambda folder: time.time() - 9}, "clock", "warning", "behind"),
        ({}, "clock", "ok", "agrees"),
        ({"cpu": CpuBudget(64, 2, 1, "cgroup quota")}, "CPU budget", "warning", "cgroup quota"),
        ({"environ": {"MASTER_PORT": "x"}}, "port", "problem", "x"),
    ],
)  # fmt: skip
def test_limits(changed: Any, name: str, state: str, told: str, tmp_path: Path) -> None:
    machine = dataclasses.replace(HERE, **changed)
    ranks_ = Topology(world_size=4, local_world_size=4)
    found = [
        *limits.cpus(machine, ranks_),
        *limits.memory(machine),
        *limits.open_files(machine),
        *limits.folders(machine, tmp_path / "not/made", "OUTPUT_DIR"),
        *limits.port(machine, ranks_),
    ]
    finding = only(found, name)
    assert finding.state == state
    assert told in finding.found
    assert bool(finding.remedy) == (state != "ok")
    assert not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    def refuses(folder: Path) -> float:
        raise PermissionError(13, "Permission denied")

    machine = dataclasses.replace(HERE, modified=refuses)
    found = only(limits.folders(machine, tmp_path, "OUTPUT_DIR"), "OUTPUT_DIR")
    assert found.state == "problem" and "Permission denied" in found.found
    gone = dataclasses.replace(HERE, temporary=tmp_path / "gone")
    found = only(limits.folders(gone, tmp_path, "OUTPUT_DIR"), "temporary files")
    assert found.state == "problem" and "does not exist" in found.found
    (tmp_path / "file").touch()
    found = only(limits.folders(HERE, tmp_path / "file", "OUTPUT_DIR"), "OUTPUT_DIR")
    assert found.state == "problem" and "is a file" in found.found


def test_a_port_that_is_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        machine = dataclasses.replace(HERE, environ={"MASTER_PORT": str(number)})
        (found,) = limits.port(machine, Topology())
        assert found.state == "warning" and f"port {number}" == found.name
        assert not list(limits.port(machine, Topology(**TORCHRUN)))  # type: ignore[arg-type]
    (found,) = limits.port(machine, Topology())
    assert found.state == "ok"


@pytest.mark.parametrize(
    ("name", "value", "state", "told"),
    [
        ("OMP_NUM_THREADS", "2", "ok", "2: threads of a rank"),
        ("OMP_NUM_THREADS", "64", "warning", "has 4 CPUs"),
        ("OMP_NUM_THREADS", "many", "problem", "no number"),
        ("CUDA_VISIBLE_DEVICES", "", "warning", "hides all GPUs"),
        ("CUDA_VISIBLE_DEVICES", "1,2", "ok", "1,2"),
        ("GLOO_SOCKET_IFNAME", "eth0", "ok", "network interface"),
        ("GLOO_SOCKET_IFNAME", "eth", "problem", "eth0, lo"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok", "network interface"),
        ("NCCL_SOCKET_IFNAME", "=eth", "problem", "no such"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok", "but these"),
        ("NCCL_P2P_DISABLE", "1", "warning", "by way of the host"),
        ("NCCL_P2P_DISABLE", "0", "ok", "NCCL reads it"),
        ("NCCL_DEBUG", "INFO", "ok", "NCCL reads it"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", "problem", "not deterministic"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "warning", "each collective"),
        ("PYTHONHASHSEED", "0", "ok", "sets"),
    ],
)
def test_environment_variables(name: str, value: str, state: str, told: str) -> None:
    machine = dataclasses.replace(HERE, environ={name: value, "HOME": "/root"})
    found = list(variables.variables(machine, deterministic=True))
    assert {finding.name for finding in found} == {name, "OMP_NUM_THREADS"}
    finding = only(found, name)
    assert finding.state == state and told in finding.found
    assert bool(finding.remedy) == (state != "ok")


def test_a_driver_without_a_build_that_uses_it(tmp_path: Path) -> None:
    proc = tmp_path / "version"
    proc.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n"
        "GCC version: gcc version 13.3.0\n"
    )
    assert driver(proc) == "570.124.06"
    assert driver(tmp_path / "none") == ""
    if torch.version.cuda:
        pytest.skip("this build of torch is for CUDA")
    machine = dataclasses.replace(HERE, driver="570.124.06")
    assert only(builds(machine), "torch").state == "problem"
    assert only(builds(HERE), "torch").state == "ok"


def test_more_ranks_than_gpus_is_a_problem() -> None:
    if torch.cuda.device_count() >= 99:
        pytest.skip("as many GPUs as that")
    topology = Topology(0, 0, 99, 99)
    found = only(devices(HERE, topology, "cuda"), "device")
    assert found.state == "problem" and "99 ranks on this node" in found.found
    assert only(devices(HERE, Topology(), "cpu"), "device").state == "ok"


@pytest.mark.gpu
def test_a_gpu_is_tried_and_named() -> None:
    found = only(devices(HERE, Topology(), "auto"), "cuda:0")
    assert torch.cuda.get_device_name(0) in found.found and found.state in ("ok", "warning")


@pytest.mark.gpu
def test_atomics_on_cuda_are_a_warning_with_the_remedy() -> None:
    class Atomics(planted.Steady):
        def train_step(self, model: Any, batch: Any) -> Any:
            spread = torch.zeros(3, device=batch.x.device).index_add(
                0, torch.arange(2**20, device=batch.x.device) % 3,
                model(batch.x).mean() * torch.linspace(0, 1, 2**20, device=batch.x.device).sin(),
            )  # fmt: skip
            return {"loss": spread.square().mean()}

    device = torch.device("cuda", 0)
    one = job(Atomics, "DIST.DEVICE", "cuda")
    (found,) = determinism(one, dataclasses.replace(ALONE, device=device), 5)
    assert found.state == "ok" or "DETERMINISTIC True" in found.remedy


# Ranks.


def told(host: str, **changed: Any) -> ranks.Told:
    finding = Topic("limits").ok("memory", f"some on {host}")
    parts: dict[str, Any] = {
        "findings": [finding],
        "versions": {"torch": "2.6.0"},
        "facts": {"CPUs a rank": "4"},
        "environment": {},
        "room": {"disk": 10 * GIB},
    }
    return ranks.Told(host, **(parts | changed))


def test_what_is_alike_is_said_once() -> None:
    everyone = [told("a"), told("a"), told("b"), told("b")]
    assert ranks.merged(everyone) == [(everyone[0].findings[0], [0, 1])]
    (compared,) = ranks.differences(everyone)
    assert (compared.state, compared.found) == ("ok", "4 ranks, on a, b")


def test_a_problem_of_one_rank_is_kept_with_the_rank() -> None:
    bad = Topic("limits").problem("memory", "none left", "buy some")
    everyone = [told("a"), told("b", findings=[bad]), told("b")]
    assert (bad, [1]) in ranks.merged(everyone)


@pytest.mark.parametrize(
    ("changed", "name", "state", "words"),
    [
        ({"versions": {"torch": "2.7.0"}}, "torch", "problem", f"2.6.0 {MOST}; 2.7.0 on rank 2"),
        ({"facts": {"CPUs a rank": "2"}}, "CPUs a rank", "warning", f"4 {MOST}; 2 on rank 2 (b)"),
        ({"environment": {"NCCL_ALGO": "Tree"}}, "NCCL_ALGO", "warning", f"not set {MOST}; Tree"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "1"}}, "CUDA_VISIBLE_DEVICES", "ok", "1 on rank"),
        ({"room": {"disk": 2 * GIB}}, "disk", "warning", "2.00 GiB on b, 10.00 GiB on a"),
    ],
)  # fmt: skip
def test_what_differs_is_named(changed: Any, name: str, state: str, words: str) -> None:
    everyone = [told("a"), told("a"), told("b", **changed), told("b", room={})]
    found = only(ranks.differences(everyone), name)
    assert found.state == state and words in found.found
    assert bool(found.remedy) == (state != "ok")


def test_clocks_that_are_apart_are_named_by_host() -> None:
    everyone = [told("a"), told("b"), told("b"), told("c")]
    found = list(ranks.clocks(everyone, [0.0, 3.0, 3.0, -0.4]))
    assert [f.found.partition(":")[0] for f in found] == ["that of b is 3.0 s ahead of that of a"]
    assert not list(ranks.clocks(everyone, [0.0, 0.9, 0.9, -0.4]))


class Writes:
    """A callback with files of its own in the run directory."""

    def __init__(self, run: Any) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        self.file = run.directory / "mine"
        self.file.write_text("begun")

    def on_step(self) -> None:
        self.file.write_text("stepped")


def test_a_machine_with_a_config_is_examined_and_left_as_it_was(tmp_path: Path) -> None:
    little = MemoryBudget(8 * GIB, 2**10, False, "free memory")
    machine = dataclasses.replace(HERE, memory=little, free=lambda folder: 100)
    one = job(planted.Steady, "DATALOADER.NUM_WORKERS", 1, directory=str(tmp_path / "run"))
    one = dataclasses.replace(one, callbacks=[(Writes, {})])
    page = examine(Topology(), one.cfg, one, 1, machine)
    assert page is not None
    states = {f.name: f.state for f, _ in page}
    assert states["disk for checkpoints"] == "problem"
    assert states["/dev/shm for loaders"] == "problem"
    assert states["loaders"] == "ok"
    assert states["gloo all-reduce"] != "problem"
    assert states["first steps"] == "ok"
    assert not (tmp_path / "run").exists()
