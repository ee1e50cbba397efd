"""What the loop does where a save cannot follow its records."""

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.engine.loop import Loop
from launcher.errors import RunError
from tests.engine.helpers import ALONE, Regression, Trainer


def test_a_run_is_not_complete_without_its_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 4, item 3: where the records before it cannot be written, the run says so and fails."""
    trainer = Trainer(Regression())
    monkeypatch.setattr(trainer.state.recorder.writer, "flush", lambda: False)
    guard: Any = SimpleNamespace(enter=lambda phase: None, stop=None)
    saver: Any = object()  # never asked to save
    loop = Loop(ALONE, guard, trainer.state, trainer.step, None, saver)  # type: ignore[arg-type]
    loop.save()  # a save under way is only skipped
    with pytest.raises(RunError, match="no last checkpoint"):
        loop.save(last=True)
