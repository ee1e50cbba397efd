"""Nodes of a cluster on one machine: each has a network, a host name and processes of its own, and
a cable to a common switch that can be pulled.

A node is a set of Linux namespaces (unshare(1)), held by a first process that ends when this one
does, and takes all others of the node with it: nothing is left, whatever happens to the tests. The
disk is shared, as run directories on a cluster are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import psutil

from tests.system import jobs

UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
PORT = 29400  # nobody else is on these networks


@cache
def missing() -> str:
    """Why no nodes can be made here, or "" where they can."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"nodes need the program {program}"
    tried = subprocess.run(
        [*UNSHARE, "--mount-proc", "ip", "link", "add", "type", "bridge"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else ""


def run(*words: object) -> None:
    """Run a short command; its failure is the test's."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{words}: {done.stderr}"


class Space:
    """A set of namespaces, by the process that keeps them."""

    def __init__(self) -> None:
        # `read` returns when this process ends, whatever ends it, for the pipe closes then; and
        # with their first process the kernel kills all others of a process namespace.
        self.holder = subprocess.Popen(
            [*UNSHARE, "--mount-proc", "sh", "-c", "echo up; read end"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == "up\n"
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text()
        self.pid = int(children)

    def inside(self, *words: object) -> list[str]:
        """The command that runs these words in here."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, *map(str, words)]

    def run(self, *words: object) -> None:
        run(*self.inside(*words))

    def end(self) -> None:
        """Kill all processes in here at once. May be called again."""
        self.holder.kill()  # --kill-child: and so the first process, and so all others
        self.holder.wait(30)
        for pipe in (self.holder.stdin, self.holder.stdout):
            assert pipe is not None
            pipe.close()


class Node(Space):
    """A computer with one network card, eth0, plugged into a switch."""

    def __init__(self, number: int, switch: Space, hosts: Path) -> None:
        super().__init__()
        self.name, self.address, self.port = f"node{number}", f"10.0.0.{number + 1}", f"p{number}"
        self.switch, self.network = switch, {"GLOO_SOCKET_IFNAME": "eth0"}
        self.run("hostname", self.name)
        self.run("mount", "--bind", hosts, "/etc/hosts")
        # Its replacement has the same hardware address, as nobody would look for another.
        card = ["eth0", "address", f"02:00:00:00:00:{number + 1:02x}"]
        cable = ["type", "veth", "peer", "name", self.port, "netns", switch.pid]
        # In the network alone: the switch's process has another number in the node's own eyes.
        run("nsenter", f"--target={self.pid}", "--net", "ip", "link", "add", *card, *cable)
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")
        switch.run("ip", "link", "set", self.port, "master", "switch")
        self.join()

    def cut(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        self.switch.run("ip", "link", "set", self.port, "down")

    def join(self) -> None:
        """Plug it in."""
        self.switch.run("ip", "link", "set", self.port, "up")

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run here; one that has ended has no command line."""
        space, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                words = process.cmdline()
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    torchrun = "torch.distributed.run" in words
                    found += [process] * (str(jobs.TRAIN) in words and not torchrun)
        return found

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> jobs.Job:
        """Start a program here."""
        # nsenter ends up in the root folder.
        words = ("env", f"--chdir={jobs.ROOT}", *words)
        return jobs.Job(self.inside(*words), {**self.network, **(env or {})})


class Cluster:
    """So many nodes on one switch, as a context."""

    def __init__(self, nodes: int, folder: Path) -> None:
        """`folder` takes the file that is /etc/hosts to the nodes."""
        self.count, self.folder = nodes, folder
        self.hosts = folder / "hosts"
        self.nodes: list[Node] = []
        self.spaces: list[Space] = []
        self.jobs: list[jobs.Job] = []

    def __enter__(self) -> Cluster:
        lines = [f"10.0.0.{number + 1} node{number}\n" for number in range(self.count)]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        try:
            self.switch = Space()
            self.spaces.append(self.switch)
            self.switch.run("ip", "link", "add", "switch", "type", "bridge")
            self.switch.run("ip", "link", "set", "switch", "up")
            for number in range(self.count):
                self.nodes.append(self._node(number))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _node(self, number: int) -> Node:
        node = Node(number, self.switch, self.hosts)
        self.spaces.append(node)
        return node

    def replace(self, number: int) -> None:
        """A new node in the place of one that has ended."""
        self.nodes[number] = self._node(number)

    def __exit__(self, *told: object) -> None:
        for space in self.spaces:  # first: their first processes adopt orphans, and reap none
            space.end()
        for job in self.jobs:
            job.kill()

    def torchrun(
        self,
        *args: object,
        ranks: int = 1,
        nodes: str = "",
        store: int = 0,
        options: Sequence[str] = (),
        conf: str = "",
        env: Mapping[str, str] | None = None,
    ) -> list[jobs.Job]:
        """Start `tools/train.py` with one torchrun a node; node `store` keeps the rendezvous."""
        started = []
        for number, node in enumerate(self.nodes):
            torchrun = [
                *(*jobs.TORCHRUN, f"--nnodes={nodes or self.count}", f"--nproc-per-node={ranks}"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.nodes[store].address}:{PORT}"),
                *("--rdzv-id=job", f"--local-addr={node.address}"),
                *("--rdzv-conf", f"is_host={int(number == store)},keep_alive_interval=1{conf}"),
                *options,
            ]
            started.append(node.start(*torchrun, jobs.TRAIN, *args, env=env))
        self.jobs += started
        return started
