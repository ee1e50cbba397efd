"""How a training process takes its imports: at half their price."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

USUAL = gc.get_threshold()
# Young objects alone are looked through, and seldom: what importing leaves behind is let go of.
SELDOM = 5_000, 10, 1_000


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Until `imported`, the garbage collector rests: while torch is imported it would look through
    what torch makes of itself again and again, which takes a third of the time."""
    if "torch" not in sys.modules:  # else the process is somebody else's
        gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        if gc.get_threshold() == SELDOM:
            gc.set_threshold(*USUAL)


def imported() -> None:
    """Wake the collector up. What was imported stays to the end, and is never looked through."""
    if gc.get_threshold() == SELDOM:
        import torch._dynamo  # noqa: F401 (which every optimiser of torch imports)

        gc.freeze()
        gc.set_threshold(*USUAL)
