"""What took a GPU's memory when it ran out, by DEBUG.MEMORY."""

from __future__ import annotations

from typing import Any

import torch

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
ENTRIES = 100_000  # allocations that are kept, with their stacks: some KB each


class MemoryHistory:
    """Records where memory is taken and given back, from before the first step on. Where it runs
    out, that is written to profile/memory_rank<K>.pickle."""

    def __init__(self, run: Run) -> None:
        self.file = run.directory / "profile" / f"memory_rank{run.runtime.rank}.pickle"
        self.records = False
        if run.runtime.device.type != "cuda":
            logger.warning("DEBUG.MEMORY: nothing to record, the device is no GPU")
            return
        try:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
            attach: Any = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]
            attach(self.ran_out)
            self.records = True
        except (AttributeError, RuntimeError, TypeError) as error:  # another torch's
            logger.warning("DEBUG.MEMORY: this torch does not record it: %s", error)

    def ran_out(self, device: int, asked: int, total: int, free: int) -> None:
        """Called by torch before it raises its error, which this must not hide."""
        told = "GPU %d has run out of memory: %.2f GiB were asked for"
        gib = asked / 2**30
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.file))
        except Exception as error:
            logger.error(f"{told}. What took it could not be written down: %s", device, gib, error)
            return
        where = "What took it is in %s: open it at https://pytorch.org/memory_viz"
        logger.error(f"{told}. {where}", device, gib, self.file)

    def on_end(self) -> None:
        if self.records:
            torch.cuda.memory._record_memory_history(enabled=None)
