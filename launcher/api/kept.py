"""Leaving a process as it was found: it is the caller's, who goes on with other work."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from launcher.errors import UsageError
from launcher.guard.stop import STOPPED, Signals

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back, at the end, what a run sets for its whole process and does not put back itself."""
    import torch
    from torch.backends import cudnn

    from launcher.edges.generators import generators_kept

    with contextlib.ExitStack() as undo:
        back = undo.callback
        undo.enter_context(generators_kept())
        undo.enter_context(warnings.catch_warnings())
        if torch.cuda.is_available():
            back(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
            back(torch.cuda.set_device, torch.cuda.current_device())
        back(torch.set_num_threads, torch.get_num_threads())
        back(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for name in ("allow_tf32", "benchmark"):
            back(setattr, cudnn, name, getattr(cudnn, name))
        anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        back(torch.autograd.set_detect_anomaly, *anomaly)
        back(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        if CUBLAS in os.environ:
            back(os.environ.__setitem__, CUBLAS, os.environ[CUBLAS])
        else:
            back(os.environ.pop, CUBLAS, None)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        back(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        yield


class EarlyStop(UsageError):
    """Asked to stop before the first step: nothing is made yet, and there is no failure to tell."""


class Interrupts(Signals):
    """The signals that ask to stop, in a process that nothing but an exception may end.

    SIGTERM asks the whole process to end: `handed_on` sends it again when the run is saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None  # the code with which a process of the launcher's own ends
        self.asked = 0  # how often by others
        self.terminated = False

    def _handle(self, number: int, frame: object) -> None:
        if self.left is None:
            self.asked += 1
        self.terminated |= number == signal.SIGTERM
        if self.left == STOPPED or not self.awaited:
            raise EarlyStop
        if self.left is not None:
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> list[int]:
        """As before; once the main thread was told to leave, none."""
        found = super().wait(seconds)
        return [] if self.left is not None else found

    def leave(self, code: int) -> None:
        """Instead of ending the process, from the guard's thread: raise in the main thread, and end
        this one."""
        self.left = code
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # which interrupts what it waits in, too
        sys.exit()

    @property
    def hung(self) -> bool:
        """Whether the guard ended the run by itself, asked by nobody."""
        return self.left not in (None, STOPPED) and self.asked < 2

    def handed_on(self) -> None:
        """After the context's end."""
        if self.terminated:
            signal.raise_signal(signal.SIGTERM)
