"""Damage to a checkpoint is always seen, and nothing in a damaged or hostile one is executed."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.store import MANIFEST, STATE, DamagedCheckpoint, Retention, load_file
from launcher.engine.resume import find
from launcher.errors import RunError, UsageError
from tests.checkpoint.helpers import Store, manifest_of, state_of
from tests.engine.helpers import ALONE, same
from tests.system.jobs import snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of two checkpoints, 1 and 2."""
    made = Store(tmp_path / "checkpoints", Retention(last=3, best=1, metric="loss"))
    for step in (1, 2):
        made.save(step, loss=0.4213 / step, accuracy=0.75)
    return made


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def edited(**changes: Any) -> Callable[[Path], Any]:
    return rewritten(lambda text: json.dumps({**json.loads(text), **changes}).encode())


def flipped(content: bytes, place: int, bit: int) -> bytes:
    """The content with one bit turned over."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def remove_all(file: Path) -> None:
    for other in file.parent.iterdir():
        other.unlink()


def replace_by_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


OF_A_FILE: dict[str, Callable[[Path], Any]] = {
    "truncated": rewritten(lambda content: content[:-1]),
    "with a flipped bit": rewritten(lambda content: flipped(content, len(content) // 2, 0)),
    "empty": rewritten(lambda content: b""),
    "missing": Path.unlink,
    "a directory": replace_by_a_directory,
}
OF_THE_MANIFEST: dict[str, Callable[[Path], Any]] = {
    "torn": rewritten(lambda content: content[:40]),
    "not UTF-8": rewritten(lambda content: b'{"step": "\xff"}'),
    "a list": rewritten(lambda content: b"[1, 2]"),
    "of nothing": rewritten(lambda content: b"{}"),
    "null": rewritten(lambda content: b"null"),
    "of another step": edited(step=7),
    "without files": edited(files=None),
    "with files of none": edited(files={}),
    "with garbage for a file": edited(files={STATE: "abc"}),
    "gone with everything": remove_all,
}
DAMAGE = {
    **{f"{file} {how}": (file, do) for file in (STATE, MANIFEST) for how, do in OF_A_FILE.items()},
    **{f"{MANIFEST} {how}": (MANIFEST, do) for how, do in OF_THE_MANIFEST.items()},
}
damages = pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)


@damages
def test_a_damaged_checkpoint_is_reported_and_passed_over(
    store: Store, name: str, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    damage(store.path(2) / name)
    with pytest.raises(DamagedCheckpoint, match=name):
        store.verify(2)
    with pytest.raises(DamagedCheckpoint, match=name):
        store.load(2)
    with caplog.at_level(logging.WARNING, "launcher"):
        found = store.newest()
    assert found is not None and found.step == 1 and same(found.state, state_of(1))
    assert list(found.damaged) == [2] and name in found.damaged[2]
    assert "checkpoint step_2 is damaged" in caplog.text
    # And the run goes on: it can judge, save beside it and over it.
    store.is_best({"loss": 0.5})
    store.save(3)
    assert store.steps() == [1, 2, 3]
    store.save(2)
    assert same(store.load(2), state_of(2))


@damages
def test_none_valid_is_an_error_that_changes_nothing(
    store: Store, name: str, damage: Callable[[Path], Any]
) -> None:
    """Where all are damaged a run stops: starting over on their remains would lose it."""
    for step in (1, 2):
        damage(store.path(step) / name)
    before = snapshot(store.directory)
    with pytest.raises(RunError, match=r"None of the 2 checkpoints .* is valid") as caught:
        store.newest()
    assert caught.value.exit_code == 1
    assert snapshot(store.directory) == before


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_no_cut_and_no_flipped_bit_goes_unseen(
    store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 5: the newest checkpoint is passed over for the one before. Of the manifest, at
    every byte: also one in a metric, a time or a key that leaves valid JSON."""
    caplog.set_level(logging.ERROR, logger="launcher.checkpoint.store")
    path, undetected = store.path(2) / name, []
    intact = path.read_bytes()
    places = [round(i * (len(intact) - 1) / 15) for i in range(16)]  # the first and the last too
    changes = {f"cut to {place} bytes": intact[:place] for place in places}
    for place in range(len(intact)) if name == MANIFEST else places:
        for bit in (place % 3, 3 + place % 5):
            changes[f"bit {bit} of byte {place}"] = flipped(intact, place, bit)
    for label, content in changes.items():
        path.write_bytes(content)
        try:
            found = store.newest()
            store.is_best({"loss": 0.1})
        except Exception as error:  # whatever else it raises ends a resume that need not end
            undetected.append(f"{label}: {type(error).__name__}: {error}")
            continue
        if found is None or found.step != 1 or list(found.damaged) != [2]:
            undetected.append(label)
    assert undetected == []
    path.write_bytes(intact)
    found = store.newest()
    assert found is not None and found.step == 2 and not found.damaged, "the test's own fault"


class Call:
    """Pickles as a call that leaves a directory behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickled_call_is_refused_and_not_executed(store: Store, tmp_path: Path) -> None:
    """Invariant 6: not even in a checkpoint whose hash is right; the one before is used."""
    path = store.commit({"model": Call(tmp_path / "executed")}, manifest_of(3))
    with pytest.raises(DamagedCheckpoint, match=r"mkdir, which is not loaded"):
        store.verify(3)  # by its files alone it is whole
    found = store.newest()
    assert found is not None
    assert (found.step, list(found.damaged)) == (2, [3])
    with pytest.raises(DamagedCheckpoint, match=r"(?s)state\.pt: .*mkdir"):
        load_file(path)
    # A file outside any checkpoint, as MODEL.WEIGHTS and --resume-from may name it.
    outside = path.joinpath(STATE).rename(tmp_path / "weights.pt")
    with pytest.raises(DamagedCheckpoint, match=r"(?s)weights\.pt: .*mkdir"):
        load_file(outside)
    assert not (tmp_path / "executed").exists()


def test_one_of_an_earlier_version_is_told_so(store: Store) -> None:
    store.commit({"progress": {"step": 3}, "ranks": []}, manifest_of(3))
    with pytest.raises(UsageError, match=r"earlier version .*MODEL\.WEIGHTS"):
        find(store, True, None, ALONE)


def test_damaged_checkpoints_are_moved_out_of_the_way(store: Store) -> None:
    """After a resume passed one over it counts for nothing: not for `best`, nor for retention."""
    (store.path(2) / MANIFEST).write_text("{}")
    (store.directory / ".tmp_step_3_1").mkdir()
    found = store.newest()
    assert found is not None
    store.clean(found.damaged)
    assert store.steps() == [1]
    assert (store.directory / "damaged_step_2" / STATE).exists()
    assert not list(store.directory.glob(".tmp_*"))
