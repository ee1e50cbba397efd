"""Saving beside the training: the state of the moment of save(), one at a time, errors told."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.errors import RunError


def manifest(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "samples": 8 * step, "world_size": 1, "metrics": {}}


class Saves:
    """A Saver, what it works on and what it told."""

    def __init__(self, folder: Path) -> None:
        self.store = CheckpointStore(folder / "checkpoints", Retention(last=10))
        self.told: list[tuple[int, Exception | None]] = []
        self.saver = Saver(self.store, self.done)
        self.weight, self.buffer = torch.zeros(1000), torch.zeros(3)
        self.gate = threading.Event()

    def done(self, manifest: dict[str, Any], seconds: float, error: Exception | None) -> None:
        assert seconds >= 0
        self.told.append((manifest["step"], error))

    def state(self, step: int) -> dict[str, Any]:
        nested = [{"exp_avg": self.weight, "step": step}, (self.weight, "text", None)]
        return {"model": {"w": self.weight, "b": self.buffer}, "optimizer": nested}

    def save(self, step: int) -> None:
        self.saver.save(self.state(step), manifest(step))

    def hold(self, patch: pytest.MonkeyPatch) -> None:
        """Commits wait for the gate."""
        commit = self.store.commit

        def waiting(*arguments: Any) -> Path:
            assert self.gate.wait(30)
            return commit(*arguments)

        patch.setattr(self.store, "commit", waiting)


@pytest.fixture
def saves(tmp_path: Path) -> Iterator[Saves]:
    made = Saves(tmp_path)
    yield made
    made.gate.set()
    made.saver.close()


def check(state: dict[str, Any], weight: float, buffer: float) -> None:
    first, second = state["optimizer"]
    for tensor in (state["model"]["w"], first["exp_avg"], second[0]):
        assert torch.equal(tensor, torch.full((1000,), weight))
    assert torch.equal(state["model"]["b"], torch.full((3,), buffer))
    assert list(second[1:]) == ["text", None]


def test_what_is_committed_is_the_state_of_the_moment_of_save(
    saves: Saves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changes afterwards: weights that the task moves itself, buffers, the update."""
    saves.hold(monkeypatch)
    saves.weight.fill_(1)
    saves.buffer.fill_(1)
    saves.save(5)
    saves.buffer.fill_(99)
    saves.weight.fill_(99)
    saves.gate.set()
    assert saves.saver.wait() is None
    check(saves.store.load(5), 1, 1)
    assert saves.store.load(5)["optimizer"][0]["step"] == 5
    assert saves.told == [(5, None)]


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_a_tensor_keeps_its_layout(saves: Saves, layout: str) -> None:
    """A fused optimiser walks its state as its weights lie: a contiguous copy would be another."""
    value = torch.randn(2, 3, 4, 5)
    value = value.to(memory_format=torch.channels_last) if layout == "channels_last" else value.mT
    for step in (1, 2):
        saves.saver.save({"model": {"w": value}}, manifest(step))
        saves.saver.wait()
        loaded = saves.store.load(step)["model"]["w"]
        assert torch.equal(loaded, value) and loaded.stride() == value.stride()


def test_an_error_after_a_save_ends_no_training(
    saves: Saves, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("a callback's")

    monkeypatch.setattr(saves.saver, "done", fails)
    saves.save(1)
    assert saves.saver.wait() is None and "a callback's" in caplog.text
    saves.save(2)


def test_a_failing_save_is_told_and_the_next_one_works(
    saves: Saves, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "launcher")
    full = OSError(28, "No space left on device")

    def fail(*_: Any) -> Path:
        raise full

    saves.save(1)
    assert saves.saver.wait() is None
    with monkeypatch.context() as patch:
        patch.setattr(saves.store, "commit", fail)
        saves.save(2)
        assert saves.saver.wait() is full
    assert saves.store.steps() == [1]
    assert saves.saver.pending is None
    saves.save(3)
    assert saves.saver.wait() is None
    assert saves.told == [(1, None), (2, full), (3, None)]
    one, two, three = caplog.messages
    assert one.startswith("checkpoint step_1 (") and three.startswith("checkpoint step_3 (")
    assert "step_2 could not be saved: OSError: [Errno 28] No space left" in two
    assert saves.store.steps() == [1, 3]


def test_at_most_one_save_is_in_flight(saves: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    saves.hold(monkeypatch)
    saves.save(1)
    assert saves.saver.pending == manifest(1)
    saves.weight.fill_(2)
    second = threading.Thread(target=saves.save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive() and saves.store.steps() == [] and saves.saver.pending == manifest(1)
    saves.gate.set()
    second.join(30)
    saves.saver.wait()
    assert saves.told == [(1, None), (2, None)]
    check(saves.store.load(1), 0, 0)
    check(saves.store.load(2), 2, 0)
    assert saves.saver.pending is None


def test_the_copies_are_kept_for_the_next_save(saves: Saves) -> None:
    saves.save(1)
    saves.saver.wait()
    first = [copy.data_ptr() for copy in saves.saver.copies]
    assert len(first) == 4
    saves.weight.fill_(3)
    saves.save(2)
    saves.saver.wait()
    assert [copy.data_ptr() for copy in saves.saver.copies] == first
    check(saves.store.load(2), 3, 0)


@pytest.mark.parametrize("other", [torch.ones(7), torch.ones(1000, dtype=torch.float64)])
def test_a_tensor_of_another_kind_gets_another_copy(saves: Saves, other: torch.Tensor) -> None:
    """As the optimiser's state does at its first step, or a parameter that is gone."""
    saves.save(1)
    saves.saver.save({"model": {"w": other}}, manifest(2))
    saves.saver.wait()
    assert torch.equal(saves.store.load(2)["model"]["w"], other)
    assert saves.store.load(2)["model"]["w"].dtype == other.dtype
    assert len(saves.saver.copies) == 1


def test_close_waits_for_the_last_save(saves: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    saves.hold(monkeypatch)
    saves.save(1)
    threading.Timer(0.3, saves.gate.set).start()
    saves.saver.close()
    assert saves.store.steps() == [1] and saves.told == [(1, None)]


def test_nothing_in_flight_is_nothing_to_wait_for(saves: Saves) -> None:
    assert saves.saver.wait() is None


def test_the_last_save_is_tried_once_more(saves: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, left = saves.store.commit, [OSError(28, "No space left on device")]

    def fail(*arguments: Any) -> Path:
        if left:
            raise left.pop()
        return commit(*arguments)

    monkeypatch.setattr(saves.store, "commit", fail)
    saves.saver.save(saves.state(1), manifest(1), last=True)
    assert saves.store.steps() == [1]
    left += [OSError(28, "No space left on device")] * 2
    with pytest.raises(RunError, match=r"the last checkpoint could not be saved: .*No space left"):
        saves.saver.save(saves.state(2), manifest(2), last=True)
