"""Python scripts as runs: forked from the server that has torch imported, as a rank each."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.system import jobs

KILL_AT = "LAUNCHER_TEST_KILL_AT"  # the update, of SGD's, that the last rank does not survive


class Script(jobs.Group):
    """`python WORDS`, as one process or as so many ranks."""

    def __init__(self, *words: object, ranks: int | None, cwd: Path, kill_at: int = 0) -> None:
        jobs.Running.__init__(self, words)
        world = {"OMP_NUM_THREADS": "1"}
        if ranks is not None:
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
            world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
        self.processes = []
        for rank in range(ranks or 1):
            env = {**world, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {})}
            if kill_at and rank == (ranks or 1) - 1:
                env[KILL_AT] = str(kill_at)
            place = jobs.clean_environment(env), str(cwd), self.out.name, self.err.name
            process = jobs.SERVER.Process(target=_forked, args=(self.command, *place))
            process.start()
            self.processes.append(process)
        self.process = self.processes[0]


def _forked(words: list[str], env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    jobs.settle_in(env, cwd, out, err)
    sys.argv, sys.path[0] = words, cwd
    if KILL_AT in env:
        _kill_at(int(env[KILL_AT]))
    runpy.run_path(words[0], run_name="__main__")
    sys.stdout.flush()


def _kill_at(update: int) -> None:
    import torch

    step, done = torch.optim.SGD.step, 0

    def counted(self: Any, *args: Any) -> Any:
        nonlocal done
        done += 1
        if done == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    torch.optim.SGD.step = counted  # type: ignore[method-assign]
