"""How a training process takes its imports: at half their price."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Until `imported`, the garbage collector rests: while torch is imported it would look through
    what torch makes of itself again and again, which takes a third of the time."""
    if "torch" not in sys.modules:  # else the process is somebody else's
        gc.disable()
    try:
        yield
    finally:
        gc.enable()


def imported() -> None:
    """Wake the collector up. What was imported stays to the end, and is never looked through."""
    if not gc.isenabled():
        import torch._dynamo  # noqa: F401 (which every optimiser of torch imports)

        gc.freeze()
        gc.enable()
