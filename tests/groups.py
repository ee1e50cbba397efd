"""Real process groups for tests: the same processes make one gloo group after the other."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from launcher.runtime.process import Runtime, end, start
from launcher.runtime.topology import Topology
from tests.engine.helpers import config
from tests.system.jobs import ROOT


def spawned(module: str, folder: Path, worlds: Sequence[int]) -> list[Any]:
    """What each rank of `python -m MODULE` found, by the size of the group."""
    sockets = [socket.socket() for _ in worlds]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    started = [
        subprocess.Popen([sys.executable, "-m", module, str(rank), str(folder), *ports], cwd=ROOT)
        for rank in range(max(worlds))
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(max(worlds))]


def serve(worlds: Sequence[int], found: Callable[[Runtime], Any]) -> None:
    """Be one of these ranks: leave what is `found` in each group that it is in."""
    rank, folder, ports = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    results: dict[int, Any] = {}
    for world_size, port in zip(worlds, ports, strict=True):
        if rank >= world_size:
            break
        world = rank, rank, world_size, world_size
        topology = Topology(*world, "torchrun", master_addr="127.0.0.1", master_port=int(port))
        results[world_size] = found(start(topology, config("DIST.DEVICE", "cpu")))
        end()
    torch.save(results, folder / f"rank{rank}.pt")
