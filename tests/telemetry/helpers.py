"""What stands in for the run around the recorder."""

from __future__ import annotations

import torch

from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.media import Media
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.sinks import Record
from launcher.telemetry.writer import Writer

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))


class Kept(Writer):
    """Keeps what it gets, as an open writer; not open, it is that of another rank."""

    def __init__(self, is_open: bool = True) -> None:
        super().__init__()
        self.is_open = is_open
        self.records: list[Record] = []
        self.media: list[Media] = []

    def write(self, record: Record) -> None:
        if self.is_open:
            self.records.append(record)

    def show(self, media: Media) -> None:
        if self.is_open:
            self.media.append(media)


def recording(step: int = 4, is_main: bool = True) -> tuple[Recorder, Kept]:
    """A recorder after so many steps, and what it writes."""
    kept = Kept(is_main)
    return Recorder(ALONE, Progress(step=step), kept), kept
