"""Runs of one process that start from a server which has torch imported already: in a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.system import jobs

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.utils.tensorboard", "launcher.engine.run"])


class Forked(jobs.Running):
    """`launcher ARGS` in a process forked from the server."""

    def __init__(self, *args: object, cwd: Path = jobs.ROOT, **env: str) -> None:
        super().__init__([str(arg) for arg in args])
        place = (str(cwd), self.out.name, self.err.name)
        self.process = SERVER.Process(target=_main, args=(self.command, env, *place))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)


def launch(*args: object, cwd: Path = jobs.ROOT, **env: str) -> jobs.Ended:
    """Run a command to its end."""
    with Forked(*args, cwd=cwd, **env) as job:
        return job.wait()


def _main(args: list[str], env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    for number, name in enumerate((out, err), start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    clean = jobs.clean_environment(env)
    os.environ.clear()
    os.environ.update(clean)
    os.chdir(cwd)
    sys.argv = ["launcher", *args]
    from launcher.cli import main

    code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
