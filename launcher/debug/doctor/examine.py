"""All checks of `launcher doctor`, on one process or on all ranks of a job."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from launcher.config import CfgNode
from launcher.debug.doctor import builds, exchange, limits, ranks, variables
from launcher.debug.doctor.determinism import determinism
from launcher.debug.doctor.findings import Finding, Machine, existing
from launcher.debug.doctor.needs import needs
from launcher.engine.run import Job
from launcher.errors import UsageError
from launcher.runtime.process import Runtime, choose_device, end, start
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory

Page = list[tuple[Finding, list[int]]]  # findings with the ranks that have made them


def examine(
    topology: Topology, cfg: CfgNode, job: Job | None, steps: int, machine: Machine | None = None
) -> Page | None:
    """Check this machine, and with a `job` whether it can do that; the page on rank 0, None on the
    others. Called by every rank. Writes nothing."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as spare:
        return _examine(topology, cfg, job, steps, machine, Path(spare))


def _examine(
    topology: Topology,
    cfg: CfgNode,
    job: Job | None,
    steps: int,
    machine: Machine | None,
    spare: Path,
) -> Page | None:
    # First of all: it forks, and nothing here has begun threads of its own yet, or taken a GPU.
    exchanged = [] if topology.distributed else list(exchange.pair())
    try:
        # What ranks tell each other goes over gloo: a broken NCCL is to be found, not waited for.
        runtime = start(topology, _on_cpu(cfg))
        machine = machine or Machine.here(topology.local_world_size)
        device = _device(topology, cfg)
        if runtime.distributed:
            exchanged = list(exchange.between_ranks(runtime, device))
        page = _page(runtime, cfg, job, device, machine, spare, exchanged)
    finally:
        end()
    if page is None or job is None or device is None or steps == 0:
        return page
    # The group is gone: nothing in the user's code can wait for ranks that are no longer there.
    share = dataclasses.replace(topology, launched_by="python")
    alone = Runtime(share, device, machine.cpu)
    elsewhere = dataclasses.replace(job, directory=RunDirectory(spare))
    return page + [(finding, [0]) for finding in determinism(elsewhere, alone, steps)]


def _page(
    runtime: Runtime,
    cfg: CfgNode,
    job: Job | None,
    device: torch.device | None,
    machine: Machine,
    spare: Path,
    exchanged: Sequence[Finding],
) -> Page | None:
    topology = runtime.topology
    output, named = (job.directory.path, "OUTPUT_DIR") if job else (Path.cwd(), "working directory")
    found = [*builds.builds(machine)]
    of_node = [
        *builds.devices(machine, topology, cfg.DIST.DEVICE),
        *limits.cpus(machine, topology),
        *limits.memory(machine),
    ]
    of_rank = [
        *limits.open_files(machine),
        *limits.folders(machine, output, named),
        *limits.port(machine, topology),
        *variables.variables(machine, cfg.DETERMINISTIC),
    ]
    needed: Sequence[Finding] = ()
    if job is not None and device is not None:
        on_device = dataclasses.replace(runtime, device=device)
        # The user's callbacks are made, too, and may write into what they take for the run's.
        elsewhere = dataclasses.replace(job, directory=RunDirectory(spare))
        needed = list(needs(elsewhere, on_device, machine, output))
    # What is a node's is told by its first rank alone.
    if topology.local_rank == 0:
        found += of_node
    found += of_rank
    found += [one for one in needed if topology.local_rank == 0 or one.name == "build"]
    told = ranks.Told(
        host=os.uname().nodename,
        findings=found,
        versions=builds.versions(),
        facts={
            "NVIDIA driver": machine.driver,
            "GPUs": builds.device_names(),
            "CPUs a rank": str(machine.cpu.per_rank),
        },
        environment=variables.told(machine),
        room=_room(machine, output) if topology.local_rank == 0 else {},
    )
    clocks = exchange.offsets(runtime) if runtime.distributed else None
    everyone = runtime.gather(told)  # a collective
    if everyone is None:
        return None
    page = ranks.merged(everyone) + [(finding, []) for finding in exchanged]
    if runtime.distributed:
        page += [(finding, []) for finding in ranks.differences(everyone)]
        page += [(finding, []) for finding in ranks.clocks(everyone, clocks or [])]
    return page


def _on_cpu(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DIST.DEVICE, cfg.DIST.BACKEND = "cpu", "gloo"
    cfg.freeze()
    return cfg


def _device(topology: Topology, cfg: CfgNode) -> torch.device | None:
    """This rank's, None where there is none for it: that is told with the devices."""
    try:
        return choose_device(topology, cfg.DIST.DEVICE)
    except UsageError:
        return None


def _room(machine: Machine, output: Path) -> dict[str, int]:
    room = {"memory": machine.memory.available, "disk": machine.free(existing(output))}
    if machine.memory.shm is not None:
        room["/dev/shm"] = machine.memory.shm
    return room
