"""A callback that asks for something, and writes down when it is called."""

import os
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))


class Asks:
    """Asks on one rank, after so many steps of the run; `notes` is a folder for a file a rank."""

    def __init__(
        self, run: Any, request: str, after: int, rank: int = 0, notes: str = "", end_s: float = 0
    ) -> None:
        """`end_s` is how long that rank takes for its end."""
        self.end_s = end_s if run.runtime.rank == rank else 0
        self.request, self.after, self.rank, self.steps = request, after, rank, 0
        self.notes = Path(notes, f"rank{run.runtime.rank}") if notes else None

    def _note(self, word: str) -> None:
        if self.notes is not None:
            with self.notes.open("a") as file:
                file.write(f"{word} {self.steps}\n")

    def on_start(self) -> None:
        self._note("start")

    def on_step(self) -> str | None:
        self.steps += 1
        return self.request if self.rank == RANK and self.steps == self.after else None

    def on_record(self, record: dict[str, float] | None) -> None:
        assert (record is None) == (RANK != 0)
        self._note("record")

    def on_evaluation(self, metrics: dict[str, float]) -> None:
        assert "val/accuracy" in metrics
        self._note("evaluation")

    def on_checkpoint(self) -> None:
        self._note("checkpoint")

    def on_end(self) -> None:
        time.sleep(self.end_s)
        self._note("end")

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]
