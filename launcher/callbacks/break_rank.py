"""One rank waits for a debugger, and the others for it (DEBUG.BREAK_RANK)."""

from __future__ import annotations

import pdb
import socket
import sys

from launcher.callbacks import Run
from launcher.guard.stop import say


class BreakRank:
    """Before the first step: a prompt on the terminal, if stdin is one, else on a port of this
    host's own. `c` goes on; `b FILE:LINE` sets breakpoints, which hold while the run goes on."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_start(self) -> None:
        rank, task, model = self.run.runtime.rank, self.run.task, self.run.model
        optimizers = self.run.optimizers
        if sys.stdin is not None and sys.stdin.isatty():
            say(f"rank {rank}: DEBUG.BREAK_RANK")
            debugger = pdb.Pdb()
        else:
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                server.listen(1)
                # On the console, where only rank 0 logs.
                port = server.getsockname()[1]
                say(f"rank {rank} waits for a debugger, on its own host: nc 127.0.0.1 {port}")
                connection, _ = server.accept()
            file = connection.makefile("rw", buffering=1)
            debugger = pdb.Pdb(stdin=file, stdout=file)
            debugger.use_rawinput = False
        debugger.set_trace()
        del task, model, optimizers  # which were at hand
