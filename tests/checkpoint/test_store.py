"""The store: whole checkpoints or none, whatever comes between, and the best of them."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.store import Retention
from tests.checkpoint.helpers import Store, manifest_of, state_of
from tests.engine.helpers import same


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", Retention(3, 1, "", "loss", "min"))


def names(store: Store) -> list[str]:
    return sorted(os.listdir(store.directory))


def contents(store: Store) -> dict[Path, bytes | None]:
    """Of all files in it, with None for each folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in store.directory.rglob("*")}


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


def test_the_last_and_the_best_stay_and_links_follow(store: Store) -> None:
    for step, loss in ((7, 0.5), (8, 0.1), (9, 0.3), (10, 0.4), (100, 0.2)):
        store.save(step, loss=loss)
    assert store.steps() == [8, 9, 10, 100]  # by number, not as names stand in a folder
    assert names(store) == ["best", "last", "step_10", "step_100", "step_8", "step_9"]
    newest = store.newest()
    assert newest is not None and newest.step == 100
    assert os.readlink(store.directory / "last") == "step_100"
    assert os.readlink(store.directory / "best") == "step_8"
    moved = store.directory.rename(store.directory.with_name("moved"))
    assert (moved / "best" / "state.pt").is_file()


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def half_a_file(state: Any, file: Any) -> None:
    file.write(b"PK half a file")
    fail()


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("torch.save", half_a_file),
        ("os.fsync", fail),
        ("json.dumps", fail),
        ("pathlib.Path.rename", fail),
    ],
)
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step"])
def test_a_failing_write_leaves_what_was_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, step: int
) -> None:
    store.save(1, loss=0.5)
    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr(name, broken)
        with pytest.raises(OSError, match="No space left"):
            store.save(step, loss=0.1)
    assert contents(store) == before
    assert same(store.load(1), state_of(1))
    store.save(2)
    assert store.steps() == [1, 2]


def test_remains_of_a_killed_save_are_no_checkpoint(store: Store) -> None:
    store.save(1)
    shutil.copytree(store.path(1), store.directory / f".tmp_step_2_{os.getpid()}")
    assert store.steps() == [1]
    store.save(2)
    assert names(store) == ["last", "step_1", "step_2"]


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
    assert store.steps() == [1, 3, 4, 5] and len(names(store)) > 6
    store.clean()
    assert names(store) == ["best", "last", "step_1", "step_3", "step_4", "step_5"]


@pytest.mark.parametrize(
    ("loss", "best"),
    [(0.4, True), (0.5, False), (0.6, False), (math.nan, False), (None, False)],
)
def test_is_best(store: Store, loss: float | None, best: bool) -> None:
    store.save(1, loss=0.5)
    store.save(2, loss=math.nan)
    assert store.is_best({} if loss is None else {"loss": loss}) is best


def test_any_score_is_better_than_none(store: Store) -> None:
    assert store.is_best({"loss": 9.0})
    store.save(1, loss=math.nan)
    assert store.is_best({"loss": 9.0})


def test_nothing_is_best_where_none_is_kept(store: Store) -> None:
    store.retention = Retention(1, 0, "", "loss", "min")
    store.save(1, loss=0.5)
    assert not store.is_best({"loss": 0.1})
    assert not (store.directory / "best").exists()
