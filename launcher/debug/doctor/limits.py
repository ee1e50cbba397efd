"""CPUs, memory, files, disks, the clock, folders and the port: what a run may use here."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.debug.doctor.findings import Finding, Machine, Topic, existing, size
from launcher.runtime.topology import Topology

TOPIC = Topic("limits")
# What Docker gives a container as /dev/shm is 64 MiB, which two workers fill.
LITTLE_SHM = 128 * 2**20
LITTLE_DISK = 2**30
FEW_FILES = 1024
CLOCK_S = 1.0
PORT = 29500  # torchrun's own default, where nothing else is given


def cpus(machine: Machine, topology: Topology) -> Iterator[Finding]:
    """The CPU budget and where it comes from."""
    cpu, ranks = machine.cpu, topology.local_world_size
    found = f"{cpu.usable} usable ({cpu.reason}), {cpu.per_rank} a rank for {ranks} on this node"
    if ranks > cpu.usable:
        yield TOPIC.warning(
            "CPU budget",
            f"{found}: ranks wait for each other's CPU",
            "start fewer ranks on this node, or ask for more CPUs (cgroup, Slurm, affinity)",
        )
    else:
        yield TOPIC.ok("CPU budget", found)


def memory(machine: Machine) -> Iterator[Finding]:
    """Memory and shared memory, without a config to judge them by."""
    budget = machine.memory
    found = f"{size(budget.available)} available ({budget.reason})"
    if budget.swapping:
        yield TOPIC.warning(
            "memory",
            f"{found}, and the machine swaps: batches are not pinned",
            "end what else uses the memory, or ask for more",
        )
    else:
        yield TOPIC.ok("memory", found)
    if budget.shm is None:
        yield TOPIC.ok("/dev/shm", "there is none: the system keeps shared memory elsewhere")
    elif budget.shm < LITTLE_SHM:
        yield TOPIC.warning(
            "/dev/shm",
            f"{size(budget.shm)} free: batches of loader workers lie there",
            "start the container with a larger one (docker run --shm-size=8g, or --ipc=host)",
        )
    else:
        yield TOPIC.ok("/dev/shm", f"{size(budget.shm)} free, for batches of loader workers")


def open_files(machine: Machine) -> Iterator[Finding]:
    """How many files a process may have open; a run raises its own limit up to this one."""
    limit = machine.open_files
    if 0 <= limit < FEW_FILES:
        yield TOPIC.warning(
            "open files",
            f"at most {limit} a process: tensors of loader workers come as open files",
            "raise the hard limit (ulimit -Hn, /etc/security/limits.conf, LimitNOFILE in systemd)",
        )
    else:
        found = "no limit" if limit < 0 else f"at most {limit} a process"
        yield TOPIC.ok("open files", f"{found}, to which a run raises its own limit")


def folders(machine: Machine, output: Path, named: str) -> Iterator[Finding]:
    """Where a run writes: whether it may, how much is free, and the file system's clock. `named`
    is how messages call `output`."""
    temporary = "TMPDIR" if machine.environ.get("TMPDIR") else "temporary files"
    for name, path in ((named, output), (temporary, machine.temporary)):
        try:
            here = existing(path)
            if not here.is_dir():
                yield TOPIC.problem(name, f"{here} is a file, no folder", "choose another folder")
                continue
            if name != named and here != path.absolute():  # a run's own folder it makes itself
                yield TOPIC.problem(
                    name, f"{path} does not exist", "make it, or choose another folder"
                )
                continue
            # Trying is the only test that holds for root, read-only mounts and full quotas alike.
            written = machine.modified(here)
        except OSError as error:
            yield TOPIC.problem(
                name,
                f"{path} cannot be written: {error.strerror}",
                "choose another folder, or have this one made writable",
            )
            continue
        free = machine.free(here)
        if free < LITTLE_DISK:
            yield TOPIC.warning(
                name, f"{path}: only {size(free)} free", "free some, or choose another folder"
            )
        else:
            yield TOPIC.ok(name, f"{path}: writable, {size(free)} free")
        if name == named:
            yield _clock(machine.clock(), written)


def _clock(now: float, written: float) -> Finding:
    year, ahead = time.gmtime(now).tm_year, written - now
    if year < 2024:
        return TOPIC.problem(
            "clock", f"it is {time.ctime(now)} by it", "set it: NTP does (timedatectl set-ntp true)"
        )
    if abs(ahead) > CLOCK_S:
        return TOPIC.warning(
            "clock",
            f"the file system's is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}: the "
            "times of files and of records do not fit together",
            "have both hosts ask a time server (NTP)",
        )
    return TOPIC.ok("clock", "agrees with the file system's to a second")


def port(machine: Machine, topology: Topology) -> Iterator[Finding]:
    """Whether the ranks' meeting point can be opened here."""
    if topology.distributed:
        return  # they have met
    given = machine.environ.get("MASTER_PORT", "")
    if given and not (given.isdigit() and 0 < int(given) < 65536):
        yield TOPIC.problem(
            "port", f"MASTER_PORT {given} is no port", "unset it, or give one of 1024 to 65535"
        )
        return
    number = int(given or PORT)
    name = f"port {number}"
    why = "MASTER_PORT" if given else "torchrun's default"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            told = "another process listens on it" if taken else str(error.strerror)
            yield TOPIC.warning(
                name,
                f"{why}; {told}",
                "start with torchrun --standalone, which takes a free one, or --master-port",
            )
        else:
            yield TOPIC.ok(name, f"{why}; free")
