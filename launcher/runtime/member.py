"""Which process a rank is, so that others find out whether it still lives. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Member:
    """A process by its host, its pid and when it began, for a pid may be given to another since."""

    host: str
    pid: int
    created: float = 0.0  # Unix seconds; 0.0 where it is not known

    @classmethod
    def here(cls) -> Member:
        """This process."""
        process = psutil.Process()
        return cls(os.uname().nodename, process.pid, process.create_time())

    def is_beside(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == os.uname().nodename

    def lives(self) -> bool:
        """Whether this very process is alive, and no zombie; False for one of another host."""
        try:
            process = psutil.Process(self.pid)
            same = not self.created or abs(process.create_time() - self.created) < 1
            dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return self.is_beside() and same and not dead
        except (psutil.Error, ValueError):  # gone, or no process id
            return False
