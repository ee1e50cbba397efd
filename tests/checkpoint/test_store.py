"""The store: whole checkpoints or none, damage noticed and passed over, nothing executed."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, Retention
from launcher.errors import RunError
from launcher.telemetry.sinks import strict


def state_of(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3, 2), float(step))},
        "progress": {"step": step, "epoch": 0, "samples": 8 * step},
        "ranks": [{"random": [1, "text", None, 2.5, torch.arange(step)]}],
    }


def manifest_of(step: int, **metrics: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // 10,
        "samples": 8 * step,
        "world_size": 1,
        "metrics": strict(metrics),  # as the loop writes them
    }


class Store(CheckpointStore):
    def save(self, step: int, **metrics: float) -> Path:
        return self.commit(state_of(step), manifest_of(step, **metrics))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", Retention(3, 1, "", "loss", "min"))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_there_is_no_checkpoint(store: Store) -> None:
    assert store.steps() == [] and store.newest() is None
    store.directory.mkdir()
    for name in ("step_x", "step_", "notes", ".tmp_step_4_123"):
        (store.directory / name).mkdir()
    assert store.steps() == [] and store.newest() is None


def test_commit_then_load(store: Store) -> None:
    path = store.save(12, loss=0.5)
    assert path == store.directory / "step_12"
    assert sorted(os.listdir(path)) == ["manifest.json", "state.pt"]
    assert same(store.load(12), state_of(12))
    manifest = store.verify(12)
    assert manifest.items() >= manifest_of(12, loss=0.5).items()
    assert list(manifest["files"]) == ["state.pt"]
    newest = store.newest()
    assert newest is not None and newest.step == 12 and same(newest.state, state_of(12))


def test_steps_are_in_the_order_of_numbers(store: Store) -> None:
    for step in (9, 10, 100):
        store.save(step)
    assert store.steps() == [9, 10, 100]
    newest = store.newest()
    assert newest is not None and newest.step == 100


def test_no_temporary_is_left_and_links_are_relative(store: Store) -> None:
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.5)):
        store.save(step, loss=loss)
    assert sorted(os.listdir(store.directory)) == ["best", "last", "step_1", "step_2", "step_3"]
    assert os.readlink(store.directory / "last") == "step_3"
    assert os.readlink(store.directory / "best") == "step_2"
    moved = store.directory.rename(store.directory.with_name("moved"))
    assert (moved / "best" / "state.pt").is_file()


def test_old_checkpoints_go_and_links_follow(store: Store) -> None:
    for step in range(1, 8):
        store.save(step, loss=1 / (step % 5 + 1))
    # The last three; the best, 4, and not 1 to 3.
    assert store.steps() == [4, 5, 6, 7]
    assert os.readlink(store.directory / "best") == "step_4"


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def half_a_file(state: Any, file: Any) -> None:
    file.write(b"PK half a file")
    fail()


FAILURES: dict[str, tuple[str, Callable[..., Any]]] = {
    "torch.save": ("torch.save", half_a_file),
    "fsync": ("os.fsync", fail),
    "manifest": ("json.dumps", fail),
    "rename": ("pathlib.Path.rename", fail),
}


@pytest.mark.parametrize(("name", "broken"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step"])
def test_a_failing_write_leaves_what_was_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, step: int
) -> None:
    store.save(1, loss=0.5)
    before = contents(store.directory)
    with monkeypatch.context() as patch:
        patch.setattr(name, broken)
        with pytest.raises(OSError, match="No space left"):
            store.save(step, loss=0.1)
    assert contents(store.directory) == before
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]
    assert same(store.load(1), state_of(1))
    store.save(2)
    assert store.steps() == [1, 2]


def test_remains_of_a_killed_save_are_no_checkpoint(store: Store) -> None:
    store.save(1)
    shutil.copytree(store.path(1), store.directory / f".tmp_step_2_{os.getpid()}")
    assert store.steps() == [1]
    store.save(2)
    assert store.steps() == [1, 2]
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]


def test_a_save_killed_between_its_two_renames_loses_nothing(store: Store) -> None:
    """Where a step is saved once more, the old one is out of the way for a moment."""
    store.save(1)
    store.path(1).rename(store.directory / ".tmp_replaced_step_1")
    newest = store.newest()
    assert newest is not None and newest.step == 1 and same(newest.state, state_of(1))
    store.clean()
    assert store.steps() == [1]


def test_one_that_a_kill_left_half_deleted_counts_for_none(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # killed before it began
        for step in range(1, 6):
            store.save(step, loss=step)
    assert store.steps() == [1, 3, 4, 5] and len(os.listdir(store.directory)) > 6
    store.clean()
    assert sorted(os.listdir(store.directory)) == [
        "best",
        "last",
        *(f"step_{n}" for n in (1, 3, 4, 5)),
    ]


def truncate(path: Path) -> None:
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def directory(path: Path) -> None:
    (path / "state.pt").unlink()
    (path / "state.pt").mkdir()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def manifest_is(text: str) -> Callable[[Path], Any]:
    return lambda path: (path / "manifest.json").write_text(text, encoding="latin-1")


def edit(**changes: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "state truncated": truncate,
    "state with a flipped bit": flip,
    "state empty": lambda path: (path / "state.pt").write_bytes(b""),
    "state missing": lambda path: (path / "state.pt").unlink(),
    "state is a directory": directory,
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest empty": manifest_is(""),
    "manifest torn": lambda path: os.truncate(path / "manifest.json", 40),
    "manifest not UTF-8": manifest_is('{"step": "\xff"}'),
    "manifest a list": manifest_is("[1, 2]"),
    "manifest of nothing": manifest_is("{}"),
    "manifest null": manifest_is("null"),
    "manifest of another step": edit(step=7),
    "manifest without files": edit(files=None),
    "manifest with files of none": edit(files={}),
    "manifest with garbage for a file": edit(files={"state.pt": "abc"}),
    "everything gone": empty,
}
damages = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


@damages
def test_damage_is_detected(store: Store, damage: Callable[[Path], Any]) -> None:
    store.save(3)
    damage(store.path(3))
    with pytest.raises(DamagedCheckpoint):
        store.verify(3)
    with pytest.raises(DamagedCheckpoint):
        store.load(3)


@damages
def test_a_damaged_checkpoint_is_reported_and_passed_over(
    store: Store, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    store.save(1)
    store.save(2)
    damage(store.path(2))
    with caplog.at_level(logging.WARNING, "launcher"):
        newest = store.newest()
    assert newest is not None and newest.step == 1
    assert "checkpoint step_2 is damaged" in caplog.text
    # And the run goes on: it can judge, save again over it, and drop what it no longer keeps.
    store.is_best({"loss": 0.5})
    store.save(2)
    assert same(store.load(2), state_of(2))


@damages
def test_none_valid_is_an_error_that_changes_nothing(
    store: Store, damage: Callable[[Path], Any]
) -> None:
    for step in (1, 2):
        store.save(step)
        damage(store.path(step))
    before = contents(store.directory)
    with pytest.raises(RunError, match=r"None of the 2 checkpoints .* is valid") as caught:
        store.newest()
    assert caught.value.exit_code == 1
    assert contents(store.directory) == before


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_a_manifest_can_stop_a_resume(store: Store, place: float, bit: int) -> None:
    shutil.rmtree(store.directory, ignore_errors=True)
    store.retention = Retention(2, 1, "1ep", "loss", "min")
    store.save(10, loss=0.5)
    store.save(20, loss=0.25)
    path = store.path(20) / "manifest.json"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    newest = store.newest()
    assert newest is not None and newest.step in (10, 20)
    store.is_best({"loss": 0.1})
    store.save(30, loss=0.3)
    assert {20, 30} <= set(store.steps())


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ({"loss": 0.4}, True),
        ({"loss": 0.5}, False),
        ({"loss": 0.6}, False),
        ({"loss": float("nan")}, False),
        ({}, False),
    ],
)
def test_is_best(store: Store, metrics: dict[str, float], best: bool) -> None:
    store.save(1, loss=0.5)
    store.save(2, loss=float("nan"))
    assert store.is_best(metrics) is best


def test_any_score_is_better_than_none(store: Store) -> None:
    assert store.is_best({"loss": 9.0})
    store.save(1, loss=float("nan"))
    assert store.is_best({"loss": 9.0})


def test_nothing_is_best_where_none_is_kept(store: Store) -> None:
    store.retention = Retention(1, 0, "", "loss", "min")
    store.save(1, loss=0.5)
    assert not store.is_best({"loss": 0.1})
    assert not (store.directory / "best").exists()


class Call:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickled_call_is_refused_and_not_executed(store: Store, tmp_path: Path) -> None:
    store.save(1)
    store.commit({"model": Call(tmp_path / "executed")}, manifest_of(2))
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt"):
        store.load(2)
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert not (tmp_path / "executed").exists()
