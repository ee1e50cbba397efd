"""The running process: its device, its process group, and the few collectives the rooms use."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launcher.config import CfgNode, parse_duration
from launcher.errors import UsageError
from launcher.runtime.cpu import CpuBudget, cpu_budget
from launcher.runtime.topology import Topology


@dataclass(frozen=True)
class Runtime:
    """What a rank knows of itself. The collectives do nothing where there is one process."""

    topology: Topology
    device: torch.device
    cpu: CpuBudget

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

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place. A collective."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value in rank order on rank 0, None elsewhere. A collective."""
        if not self.distributed:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank. A collective."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank. A collective."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def broadcast_state(self, value: Any = None) -> Any:
        """Rank 0's nest of values and tensors, on every rank; tensors on the CPU.

        Tensors are sent one by one, so no rank holds more than one extra. Collectives: one, and
        one a tensor.
        """
        if not self.distributed:
            return value
        tensors: list[torch.Tensor] = []
        skeleton = self.broadcast(_take_out(value, tensors) if self.is_main else None)
        shapes = self.broadcast([(t.shape, t.dtype) for t in tensors] if self.is_main else None)
        received = []
        for i, (shape, dtype) in enumerate(shapes):
            # NCCL sends only what lies on a GPU.
            on_device = (
                tensors[i].to(self.device).contiguous()
                if self.is_main
                else torch.empty(shape, dtype=dtype, device=self.device)
            )
            dist.broadcast(on_device, src=0)
            received.append(tensors[i] if self.is_main else on_device.cpu())
        return _put_back(skeleton, received)

    def broadcast_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Make tensors equal to rank 0's, in place. One collective a tensor."""
        if self.distributed:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


class _Tensor(int):
    """The place of a tensor that is sent by itself."""


def _take_out(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Tensor(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_take_out(item, tensors) for item in value])
    return value


def _put_back(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _Tensor):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _put_back(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_put_back(item, tensors) for item in value])
    return value


def choose_device(topology: Topology, choice: str) -> torch.device:
    """The device of this rank; on CUDA one GPU a local rank, bound before its first use.

    Raises UsageError where a node has fewer GPUs than ranks, before any process group exists.
    """
    gpus = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and gpus == 0):
        return torch.device("cpu")
    if topology.local_world_size > gpus:
        raise UsageError(
            f"{topology.local_world_size} ranks on this node but {gpus} CUDA device"
            f"{'s' * (gpus != 1)}: start with --nproc-per-node={max(gpus, 1)}, or set "
            "DIST.DEVICE cpu."
        )
    torch.cuda.set_device(topology.local_rank)
    return torch.device("cuda", topology.local_rank)


@contextmanager
def start(topology: Topology, cfg: CfgNode) -> Iterator[Runtime]:
    """Set this process up from its config, and take the process group down on every way out."""
    if topology.launched_by == "torchrun":
        _end_with_parent()
    device = choose_device(topology, cfg.DIST.DEVICE)
    budget = cpu_budget(topology.local_world_size)
    _set_precision(cfg)
    seed_everything(cfg.SEED, topology.rank)
    if topology.distributed:
        _join_group(topology, cfg, device)
    try:
        yield Runtime(topology, device, budget)
    finally:
        if dist.is_initialized():
            # DDP's reference cycles would keep gloo's threads alive into the interpreter's end,
            # where they abort the process.
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


def _join_group(topology: Topology, cfg: CfgNode, device: torch.device) -> None:
    timeout = parse_duration(cfg.DIST.INIT_TIMEOUT)
    assert timeout is not None  # the config check demands one
    cuda = device.type == "cuda"
    # NCCL's communicator is made on the named device at once, not on whatever device is current
    # at the first collective; rank, world size and address come from the topology, so that srun
    # and torchrun are one path.
    os.environ.setdefault("MASTER_ADDR", topology.master_addr)
    os.environ.setdefault("MASTER_PORT", str(topology.master_port))
    try:
        dist.init_process_group(
            backend=cfg.DIST.BACKEND or ("nccl" if cuda else "gloo"),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=timeout.amount),
            device_id=device if cuda else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UsageError(
            f"{topology} could not join its process group at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {cfg.DIST.INIT_TIMEOUT} (DIST.INIT_TIMEOUT): "
            f"{error}. Did all ranks start, with the same rendezvous address?"
        ) from error


def _set_precision(cfg: CfgNode) -> None:
    # "highest" keeps fp32 products in fp32; "high" lets them run as tf32 on GPUs that have it.
    tf32 = cfg.TRAIN.PRECISION == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
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
