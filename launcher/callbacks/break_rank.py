"""One rank waits for a debugger, and the others for it (DEBUG.BREAK_RANK)."""

from __future__ import annotations

import pdb
import socket
import sys

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)


class BreakRank:
    """Before the first step: a prompt on the terminal, if stdin is one, else on a port of this
    host's own. `c` goes on; `b FILE:LINE` sets breakpoints, which hold while the run goes on."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_start(self) -> None:
        rank, model, optimizers, task = (
            self.run.runtime.rank,
            self.run.model,
            self.run.optimizers,
            self.run.task,
        )
        if sys.stdin is not None and sys.stdin.isatty():
            print(f"rank {rank}: DEBUG.BREAK_RANK", file=sys.stderr, flush=True)
            debugger = pdb.Pdb()
        else:
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                server.listen(1)
                logger.warning(
                    "DEBUG.BREAK_RANK: rank %d waits for a debugger on its host: nc 127.0.0.1 %d",
                    *(rank, server.getsockname()[1]),
                )
                connection, _ = server.accept()
            file = connection.makefile("rw", buffering=1)
            debugger = pdb.Pdb(stdin=file, stdout=file)
            debugger.use_rawinput = False
        debugger.set_trace()
        # `task`, `model` and `optimizers` are at hand.
        del model, optimizers, task
