"""Damage to a checkpoint is always seen, and nothing in a damaged or hostile one is executed."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.store import MANIFEST, STATE, CheckpointStore, Retention, load_file
from launcher.errors import RunError
from tests.system.jobs import snapshot

OLD, NEW = 10, 20
PLACES = 16


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of checkpoints are passed over here, each with a warning."""
    caplog.set_level(logging.ERROR, logger="launcher.checkpoint.store")


def fill(directory: Path) -> CheckpointStore:
    """A store of two checkpoints."""
    store = CheckpointStore(directory, Retention(last=2, best=1, metric="val/loss"))
    for step in (OLD, NEW):
        weights = torch.randn(4096, generator=torch.Generator().manual_seed(step))
        state = {"model": {"weight": weights}, "progress": {"step": step}, "ema": None}
        manifest = {
            "step": step,
            "epoch": step // 10,
            "samples": 8 * step,
            "world_size": 2,
            "metrics": {"val/loss": 0.4213 / step, "val/accuracy": 0.75},
            "time": 1795258612.539 + step,
            "versions": {"torch": "2.6.0"},
        }
        store.commit(state, manifest)
    return store


def undetected(store: CheckpointStore, name: str, damages: dict[str, bytes]) -> list[str]:
    """Which of these contents of a file of the newest checkpoint were not passed over."""
    path = store.path(NEW) / name
    intact, wrong = path.read_bytes(), []
    for label, content in damages.items():
        assert content != intact
        path.write_bytes(content)
        try:
            found = store.newest()
        except Exception as error:  # whatever else it raises ends a resume that need not end
            wrong.append(f"{label}: {type(error).__name__}: {error}")
            continue
        if found is None or found.step != OLD or list(found.damaged) != [NEW]:
            wrong.append(label)
    path.write_bytes(intact)
    found = store.newest()
    assert found is not None and found.step == NEW and not found.damaged, "the test's own fault"
    return wrong


def cuts(content: bytes) -> dict[str, bytes]:
    """The content truncated at 16 places, the first and the last byte among them."""
    at = [round(i * (len(content) - 1) / (PLACES - 1)) for i in range(PLACES)]
    return {f"cut to {length} of {len(content)} bytes": content[:length] for length in at}


def flips(content: bytes, places: list[int], bit: Callable[[int], int]) -> dict[str, bytes]:
    """The content with one bit turned over, once for each place."""
    damages = {}
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit(place)
        around = content[max(0, place - 12) : place + 12] if len(content) < 4096 else b""
        damages[f"bit {bit(place)} of byte {place} {around!r}"] = bytes(damaged)
    return damages


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_truncated_file_is_detected(name: str, tmp_path: Path) -> None:
    """Invariant 5: cut at 16 places, the newest checkpoint is passed over for the one before."""
    store = fill(tmp_path)
    assert undetected(store, name, cuts((store.path(NEW) / name).read_bytes())) == []


def test_a_flipped_bit_of_the_state_is_detected(tmp_path: Path) -> None:
    """Invariant 5: one bit at 16 places, the first and the last byte among them."""
    store, draw = fill(tmp_path), random.Random(0)
    content = (store.path(NEW) / STATE).read_bytes()
    places = [round(i * (len(content) - 1) / (PLACES - 1)) for i in range(PLACES)]
    assert undetected(store, STATE, flips(content, places, lambda _: draw.randrange(8))) == []


def test_a_flipped_bit_of_the_manifest_is_detected(tmp_path: Path) -> None:
    """Invariant 5: one bit of any byte, so also one in a metric, a time or a key that leaves valid
    JSON: retention and `best` go by these."""
    store = fill(tmp_path)
    content = (store.path(NEW) / MANIFEST).read_bytes()
    wrong = undetected(store, MANIFEST, flips(content, [*range(len(content))], lambda i: i % 3))
    assert wrong == [], f"{len(wrong)} of {len(content)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_missing_file_is_detected(name: str, tmp_path: Path) -> None:
    """Invariant 5: a checkpoint without its manifest, or without its state, is passed over."""
    store = fill(tmp_path)
    (store.path(NEW) / name).unlink()
    found = store.newest()
    assert found is not None
    assert (found.step, list(found.damaged)) == (OLD, [NEW])
    assert name in found.damaged[NEW]


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    """Invariant 5: what another program left under a checkpoint's name is passed over."""
    store = fill(tmp_path)
    shutil.rmtree(store.path(NEW))
    store.path(NEW).mkdir()
    found = store.newest()
    assert found is not None and found.step == OLD


class Call:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickled_call_is_refused_and_not_executed(tmp_path: Path) -> None:
    """Invariant 6: not even in a checkpoint whose hash is right; the one before is used."""
    marker = tmp_path / "executed"
    store = fill(tmp_path / "checkpoints")
    hostile = {"model": {}, "progress": {"step": 30}, "call": Call(marker)}
    manifest = {"step": 30, "epoch": 3, "samples": 240, "world_size": 1, "metrics": {}}
    store.commit(hostile, manifest)
    store.verify(30)  # as far as its manifest goes it is whole
    found = store.newest()
    assert found is not None
    assert (found.step, list(found.damaged)) == (NEW, [30])
    with pytest.raises(Exception, match=r"step_30|mkdir|weights_only|Unsupported|Weights only"):
        load_file(store.path(30))
    # A file outside any checkpoint, as MODEL.WEIGHTS and --resume-from may name it.
    with pytest.raises(Exception, match=r"mkdir|weights_only|Weights only"):
        load_file(store.path(30) / STATE)
    assert not marker.exists()


def test_none_valid_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    """Where all are damaged a run stops: starting over on their remains would lose it."""
    store = fill(tmp_path)
    (store.path(OLD) / MANIFEST).unlink()
    state = store.path(NEW) / STATE
    state.write_bytes(state.read_bytes()[:-1])
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="None of the 2 checkpoints"):
        store.newest()
    assert snapshot(tmp_path) == before


def test_damaged_checkpoints_are_moved_out_of_the_way(tmp_path: Path) -> None:
    """After a resume passed one over it counts for nothing: not for `best`, nor for retention."""
    store = fill(tmp_path)
    (store.path(NEW) / MANIFEST).write_text("{}")
    (tmp_path / ".tmp_step_30_1").mkdir()
    found = store.newest()
    assert found is not None
    store.clean(found.damaged)
    assert store.steps() == [OLD]
    assert (tmp_path / f"damaged_step_{NEW}" / STATE).exists()
    assert not list(tmp_path.glob(".tmp_*"))


def test_no_checkpoints_are_no_error(tmp_path: Path) -> None:
    """A run that died before its first checkpoint starts over."""
    assert CheckpointStore(tmp_path / "none").newest() is None
    assert CheckpointStore(tmp_path).newest() is None
