"""Saving beside the training: the state of the moment of save(), one at a time, errors told."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.store import Retention
from launcher.errors import RunError
from tests.checkpoint.helpers import Store, manifest_of
from tests.engine.helpers import same

FULL = OSError(28, "No space left on device")


class Saves(Store):
    """A store whose commits wait for the gate, and fail with the errors it has; a Saver that works
    on it, and what that told."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, Retention(last=10))
        self.gate, self.errors = threading.Event(), list[Exception]()
        self.gate.set()
        self.told: list[tuple[int, Exception | None]] = []
        self.saver = Saver(self, self.done)
        self.weight, self.buffer = torch.zeros(1000), torch.zeros(3)

    def done(self, manifest: dict[str, Any], seconds: float, error: Exception | None) -> None:
        assert seconds >= 0
        self.told.append((manifest["step"], error))

    def commit(self, state: dict[str, Any], manifest: dict[str, Any]) -> Path:
        assert self.gate.wait(30)
        if self.errors:
            raise self.errors.pop()
        return super().commit(state, manifest)

    def state(self, step: int) -> dict[str, Any]:
        nested = [{"exp_avg": self.weight, "step": step}, (self.weight, "text", None)]
        return {"model": {"w": self.weight, "b": self.buffer}, "optimizer": nested}

    def begin(self, step: int, last: bool = False) -> None:
        self.saver.save(self.state(step), manifest_of(step), last)


@pytest.fixture
def saves(tmp_path: Path) -> Iterator[Saves]:
    made = Saves(tmp_path / "checkpoints")
    yield made
    made.gate.set()
    made.saver.close()


def test_each_save_is_of_its_moment_and_at_most_one_is_in_flight(saves: Saves) -> None:
    """Whatever changes afterwards: weights that the task moves itself, buffers, the update."""
    assert saves.saver.wait() is None
    saves.gate.clear()
    first = copy.deepcopy(saves.state(1))
    saves.begin(1)
    assert saves.saver.pending == manifest_of(1)
    saves.weight.fill_(2)
    saves.buffer.fill_(3)
    second = copy.deepcopy(saves.state(2))
    thread = threading.Thread(target=saves.begin, args=(2,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and saves.steps() == [] and saves.saver.pending == manifest_of(1)
    saves.gate.set()
    thread.join(30)
    saves.weight.fill_(99)
    assert saves.saver.wait() is None and saves.saver.pending is None
    assert saves.told == [(1, None), (2, None)]
    assert same(saves.load(1), first) and same(saves.load(2), second)


def test_an_error_after_a_save_ends_no_training(
    saves: Saves, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("a callback's")

    monkeypatch.setattr(saves.saver, "done", fails)
    saves.begin(1)
    assert saves.saver.wait() is None and "a callback's" in caplog.text
    saves.begin(2)


def test_a_failing_save_is_told_and_the_next_one_works(
    saves: Saves, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "launcher")
    saves.begin(1)
    assert saves.saver.wait() is None
    saves.errors = [FULL]
    saves.begin(2)
    assert saves.saver.wait() is FULL
    assert saves.steps() == [1] and saves.saver.pending is None
    saves.begin(3)
    assert saves.saver.wait() is None
    assert saves.steps() == [1, 3]
    assert saves.told == [(1, None), (2, FULL), (3, None)]
    one, two, three = caplog.messages
    assert one.startswith("checkpoint step_1 (") and three.startswith("checkpoint step_3 (")
    assert "step_2 could not be saved: OSError: [Errno 28] No space left" in two


def test_the_last_save_is_tried_once_more(saves: Saves) -> None:
    saves.errors = [FULL]
    saves.begin(1, last=True)
    assert saves.steps() == [1]
    saves.errors = [FULL, FULL]
    with pytest.raises(RunError, match=r"the last checkpoint could not be saved: .*No space left"):
        saves.begin(2, last=True)


def test_the_copies_are_kept_for_the_next_save(saves: Saves) -> None:
    saves.begin(1)
    saves.saver.wait()
    first = [copied.data_ptr() for copied in saves.saver.copies]
    assert len(first) == 4
    saves.weight.fill_(3)
    saves.begin(2)
    saves.saver.wait()
    assert [copied.data_ptr() for copied in saves.saver.copies] == first
    assert same(saves.load(2), saves.state(2))


IMAGES = torch.arange(120.0).view(2, 3, 4, 5)
OTHERS = {
    "shape": torch.ones(7),
    "type": torch.ones(1000, dtype=torch.float64),
    "channels last": IMAGES.to(memory_format=torch.channels_last),
    "transposed": IMAGES.mT,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_tensor_of_another_kind_gets_another_copy(saves: Saves, other: torch.Tensor) -> None:
    """As the optimiser's state does at its first step, or a parameter that is gone. The layout too:
    a fused optimiser walks its state as its weights lie."""
    saves.begin(1)
    for step in (2, 3):
        saves.saver.save({"model": {"w": other}}, manifest_of(step))
        saves.saver.wait()
        loaded = saves.load(step)["model"]["w"]
        assert torch.equal(loaded, other)
        assert (loaded.dtype, loaded.stride()) == (other.dtype, other.stride())
    assert len(saves.saver.copies) == 1


def test_close_waits_for_the_last_save(saves: Saves) -> None:
    saves.gate.clear()
    saves.begin(1)
    threading.Timer(0.3, saves.gate.set).start()
    saves.saver.close()
    assert saves.steps() == [1] and saves.told == [(1, None)]
