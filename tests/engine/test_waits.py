"""No step waits for the device, whatever it records: shown on torch's meta device, whose tensors
hold no values, so that to read one raises."""

import contextlib
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.callbacks.histograms import Histograms
from launcher.engine import step
from launcher.engine.agreement import Agreement
from launcher.guard.stop import LAG
from launcher.tasks.pictures import spread
from tests.engine.helpers import ALONE, Regression, Trainer

META = replace(ALONE, device=torch.device("meta"))


class Recording(Regression):
    """Its data are where the model is, and it records numbers and tensors of its own."""

    def __init__(self, weighted: bool) -> None:
        super().__init__(weighted)
        self.x, self.y, self.w = (t.to("meta") for t in (self.x, self.y, self.w))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        self.recorder.scalar("tokens", 17)
        self.recorder.scalar("gate", batch[0].mean(), weight=3)
        # A number, and a tensor on the host.
        return {**super().train_step(model, batch), "number": 0.5, "coin": torch.ones(())}


@pytest.fixture(autouse=True)
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what torch does not do on this device, and does not wait for on CUDA."""

    def norm(gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([gradient.norm() for gradient in gradients]).norm()

    monkeypatch.setattr(step, "norm_of", norm)
    monkeypatch.setattr(step, "autocast", lambda cfg, device: contextlib.nullcontext())
    # On CUDA it reads what was agreed on eight steps before.
    monkeypatch.setattr(Agreement, "seen", lambda self: frozenset())


SEEN = Agreement.seen


@pytest.mark.parametrize("weighted", [False, True])
def test_steps(weighted: bool) -> None:
    """Only a record reads: what all steps added, at once."""
    words = ("MODEL.EMA_DECAY", 0.9, "LOG.HISTOGRAMS", "1step")
    trainer = Trainer(Recording(weighted), *words, runtime=META, micro=3)
    trainer.run(5)
    found = next(c.found for c in trainer.state.callbacks.all if isinstance(c, Histograms))
    assert found and all(values.is_meta for values in found.values())
    with pytest.raises(NotImplementedError):
        trainer.recorded()


def test_a_histogram_of_a_task() -> None:
    assert spread(torch.ones(7, 3, device="meta")).is_meta


def test_a_process_alone_on_a_device_that_has_nothing_to_say_waits_for_nothing() -> None:
    """Each step has an answer on its way, which a checkpoint reads as well."""
    agreement = Agreement(ALONE.device, 1, deque(), alone=True)
    agreement.carrier = SimpleNamespace(is_cuda=True, grad=None)  # type: ignore[assignment]
    for _ in range(2 * LAG):
        assert agreement.say(frozenset(), 1.0, False) is None
        assert SEEN(agreement) == frozenset()
    assert agreement.on_their_way() == [[]] * LAG
