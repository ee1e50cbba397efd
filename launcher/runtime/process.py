"""The running process: its device, its process group, and the few collectives the rooms use."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launcher.config import CfgNode, seconds
from launcher.edges import flight
from launcher.edges.batch import is_dense, map_tensors
from launcher.edges.parcel import gathered
from launcher.errors import RunError, UsageError
from launcher.runtime.cpu import CpuBudget, cpu_budget
from launcher.runtime.topology import Topology

# The guard ends what hangs, and tells which rank it was; the backend's own timeout, which kills
# every rank without telling, must never come before it.
BEYOND_GUARD_S = 600.0


class Tally:
    """Collectives that were begun on groups beside the default one."""

    begun = 0


@dataclass(frozen=True)
class Runtime:
    """What a rank knows of itself. The collectives do nothing where there is one process."""

    topology: Topology
    device: torch.device
    cpu: CpuBudget
    # This attempt's, on a connection of its own; where there is a process group.
    store: dist.Store | None = None
    timeout: timedelta | None = None  # of a collective; None is torch's own
    beside: Tally = field(default_factory=Tally, compare=False)

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def distributed(self) -> bool:
        return self.topology.distributed

    @property
    def is_main(self) -> bool:
        return self.topology.rank == 0

    def collectives(self) -> int:
        """How many collectives this rank has begun: the rank that all others wait for has begun
        fewest. Read by the guard's thread; costs 0.2 microseconds."""
        try:
            group = dist.distributed_c10d._get_default_group()
            number = int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, AttributeError):  # not yet, or no more, or another torch
            return -1
        return number + self.beside.begun

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value in rank order on rank 0, None elsewhere. One collective, of 4 KiB a
        rank; from ranks whose value is larger, rank 0 receives the rest one by one."""
        if not self.distributed:
            return [value]
        begun = self.collectives()
        values = gathered(value, self.device)
        self.beside.begun -= self.collectives() - begun - 1  # what rank 0 receives is no collective
        return values

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank. A collective."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What the function returns on rank 0, on every rank. A collective."""
        return self.broadcast(function() if self.is_main else None)

    def broadcast_state(self, value: Any = None) -> Any:
        """Rank 0's nest of values and tensors, on every rank; tensors on the CPU.

        Tensors are sent one by one, so no rank holds more than one extra. Collectives: one, and
        one a tensor.
        """
        if not self.distributed:
            return value
        # The nest without its tensors' numbers, but for those that are more than their numbers.
        nest = map_tensors(value, lambda t: t.to("meta") if is_dense(t) else t.cpu())
        nest = self.broadcast(nest)

        def send(tensor: torch.Tensor) -> torch.Tensor:
            if is_dense(tensor):
                # NCCL sends only what lies on a GPU. As bytes, in the order in which they lie:
                # backends do not know every type, and a fused optimiser goes by the layout.
                sent = torch.empty_like(tensor, device=self.device).copy_(tensor)
                dist.broadcast(_bytes(sent), src=0)
            return tensor

        def receive(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return tensor
            received = torch.empty_like(tensor, device=self.device)
            dist.broadcast(_bytes(received), src=0)
            return received.cpu()

        return map_tensors(value, send) if self.is_main else map_tensors(nest, receive)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor without gaps."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def choose_device(topology: Topology, choice: str) -> torch.device:
    """The device of this rank; on CUDA one GPU a local rank, bound before its first use.

    Raises UsageError where a node has fewer GPUs than ranks, before any process group exists.
    """
    gpus = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and gpus == 0):
        return torch.device("cpu")
    if topology.local_world_size > gpus:
        raise UsageError(
            f"{topology.local_world_size} ranks on this node, CUDA devices: {gpus}. Start with "
            f"--nproc-per-node={max(gpus, 1)}, or set DIST.DEVICE cpu."
        )
    torch.cuda.set_device(topology.local_rank)
    return torch.device("cuda", topology.local_rank)


def start(topology: Topology, cfg: CfgNode) -> Runtime:
    """Set this process up from its config, and join the process group. A collective.

    Raises UsageError where a node has too few GPUs, RunError where not all ranks come.
    """
    if topology.launched_by == "torchrun":
        _end_with_parent()
    device = choose_device(topology, cfg.DIST.DEVICE)
    _set_precision(cfg)
    seed_everything(cfg.SEED, 0 if cfg.TRAIN.SHARDS else topology.rank)
    limits = (cfg.DIST.INIT_TIMEOUT, cfg.DIST.TRAIN_TIMEOUT, cfg.DIST.SAVE_TIMEOUT)
    timeout = timedelta(seconds=max(map(seconds, limits)) + BEYOND_GUARD_S)
    store = _join_group(topology, cfg, device, timeout) if topology.distributed else None
    return Runtime(topology, device, cpu_budget(topology.local_world_size), store, timeout)


def end() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        # DDP's reference cycles would keep gloo's threads alive into the interpreter's end, where
        # they abort the process.
        gc.collect()
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when torchrun dies (Linux; prctl(2), PR_SET_PDEATHSIG).

    Ranks that outlive a killed torchrun would go on beside the run's successor.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == 1:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)


def _join_group(
    topology: Topology, cfg: CfgNode, device: torch.device, timeout: timedelta
) -> dist.Store:
    """Join the process group; a store for this attempt, on a connection of its own: a call of the
    group's would block others on the same one."""
    init_s = seconds(cfg.DIST.INIT_TIMEOUT)
    deadline = time.monotonic() + init_s
    cuda = device.type == "cuda"
    # torchrun's agent keeps a store for its workers; under srun rank 0 keeps one.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store, another = (
            dist.TCPStore(
                topology.master_addr,
                topology.master_port,
                is_master=keeps and topology.is_main and not shared,
                timeout=timedelta(seconds=init_s),
                wait_for_workers=False,
            )
            for keeps in (True, False)
        )
        attempt = _meet(dist.PrefixStore("launcher/meet", store), topology, deadline)
        backend = cfg.DIST.BACKEND or ("nccl" if cuda else "gloo")
        flight.switch_on(backend)
        # NCCL's communicator is made on the named device at once, not on whatever device is
        # current at the first collective.
        dist.init_process_group(
            backend=backend,
            store=dist.PrefixStore(f"launcher/{attempt}/group", store),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise RunError(
            f"{topology} could not join its process group at {topology.master_addr}:"
            f"{topology.master_port} within {cfg.DIST.INIT_TIMEOUT} (DIST.INIT_TIMEOUT): "
            f"{error}. Did all ranks start, with the same rendezvous address?"
        ) from error
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        # By default gloo takes the address of the host's own name, which may be 127.0.1.1.
        raise UsageError(
            f"{topology} could not connect to the other ranks: {error}. Set GLOO_SOCKET_IFNAME to "
            "the network interface that reaches the other nodes, on each node."
        ) from error
    return dist.PrefixStore(f"launcher/{attempt}/board", another)


def _meet(store: dist.Store, topology: Topology, deadline: float) -> str:
    """Agree with all ranks on a new name for this attempt.

    torchrun's store outlives its workers' restarts, and nothing that torchrun tells a worker names
    the attempt for all of them: with two agents the restart count rises on the failed worker's node
    alone, and torch's own prefix, made of it, lets the ranks miss each other for ever. Raises
    TimeoutError with the ranks that did not come.

    Every rank says hello with a word of its own. Rank 0 calls the roll, under a new name whenever a
    hello has changed; a rank that finds its own word in the roll nods. When all have nodded to the
    same name, rank 0 says go. What an earlier attempt left never matches.
    """
    ranks, word, nodded, pause = range(topology.world_size), uuid.uuid4().hex, "", 0.01
    store.set(f"hello/{topology.rank}", word)
    hellos, nods = ([f"{what}/{r}" for r in ranks] for what in ("hello", "nod"))
    called: list[bytes] = []
    name = ""
    while time.monotonic() < deadline:
        if topology.is_main and store.check(hellos):
            found = store.multi_get(hellos)
            if found != called:
                called, name = found, uuid.uuid4().hex
                store.set("roll", json.dumps([name, *(hello.decode() for hello in found)]))
            if store.check(nods) and set(store.multi_get(nods)) == {name.encode()}:
                store.set("go", name)
        if store.check(["roll"]):
            roll, *words = json.loads(store.get("roll"))
            if roll != nodded and words[topology.rank : topology.rank + 1] == [word]:
                nodded = roll
                store.set(f"nod/{topology.rank}", nodded)
        if nodded and store.check(["go"]) and store.get("go").decode() == nodded:
            return nodded
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    missing = [r for r in ranks if not store.check([f"hello/{r}"])]
    raise TimeoutError(f"ranks {missing} did not come" if missing else "not all ranks came")


def _set_precision(cfg: CfgNode) -> None:
    # "highest" keeps fp32 products in fp32; "high" lets them run as tf32 on GPUs that have it.
    tf32 = cfg.TRAIN.PRECISION == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.autograd.set_detect_anomaly(cfg.DEBUG.DETECT_ANOMALY)
    if cfg.DETERMINISTIC:
        # cuBLAS reads this when its first handle is made, so it is set before any CUDA call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch (all devices), numpy and random from (seed, rank)."""
    state = np.random.SeedSequence([seed, rank]).generate_state(3, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))
    np.random.seed(int(state[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(state[2]))
