"""A run that goes no further than its test lets it, so that nothing hangs on who is faster."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.tasks.digits import Digits

if TYPE_CHECKING:  # ranks import this file too
    from tests.system.jobs import Running

LEASHED_DIGITS = f"{__file__}:LeashedDigits"
FILE = os.environ.get("LAUNCHER_TEST_LEASH", "")


class Leash:
    """How many steps a run may do; give it `env`."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.file = folder / "leash"
        self.env = {"LAUNCHER_TEST_LEASH": str(self.file)}
        self.to(steps)

    def to(self, steps: int) -> None:
        self.file.with_suffix(".new").write_text(str(steps))
        self.file.with_suffix(".new").replace(self.file)

    def wait(self, job: Running) -> None:
        """Wait until the run has done its steps and waits for more."""
        reached = self.file.with_suffix(".reached")
        job.until(
            lambda: reached.exists() and reached.read_text() == self.file.read_text(),
            f"step {self.file.read_text()}",
        )


def obey(step: int) -> None:
    """What a task calls at the beginning of a step: waits where the leash is too short for it."""
    while FILE and int(allowed := Path(FILE).read_text()) < step:
        Path(FILE).with_suffix(".reached").write_text(allowed)
        time.sleep(0.01)


class LeashedDigits(Digits):
    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        obey(self.recorder.step)
        return super().train_step(model, batch)
