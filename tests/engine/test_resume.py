"""Going on from a checkpoint: which one, and with which changes of the config."""

import logging
import os
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.store import Retention
from launcher.config.changes import check_changes
from launcher.engine.resume import find
from launcher.errors import RunError, UsageError
from launcher.models.weights import choose_checkpoint
from tests.checkpoint.helpers import Store, state_of
from tests.engine.helpers import ALONE, config, same


def check(*words: object, allow: str = "", length: int = 9, saved: str = "") -> None:
    allowed = frozenset(allow.split(",")) - {""}
    state = {"config": saved or config().dump(), "dataset_length": 9}
    check_changes(state, config(*words), length, allowed)


def test_the_same_config_may_go_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "launcher")
    check()
    assert caplog.messages == []


FREE = """
    OUTPUT_DIR=elsewhere LOG.EVERY=7step LOG.TENSORBOARD=false CHECKPOINT.KEEP_LAST=5
    CHECKPOINT.EVERY=7step EVAL.EVERY=7step EVAL.BATCH_SIZE=3 DIST.TRAIN_TIMEOUT=9min
    DATALOADER.NUM_WORKERS=3 DATALOADER.PREFETCH_FACTOR=3 DATALOADER.PIN_MEMORY=false
    MODEL.WEIGHTS=w.pt
"""
EXACT = """
    SEED=4 TRAIN.BATCH_SIZE=3 TRAIN.MICRO_BATCH_SIZE=3 TRAIN.DURATION=7ep
    TRAIN.SAMPLER=sequential TRAIN.PRECISION=bf16 OPTIM.LR=0.5 OPTIM.BETAS=[0.5,0.5]
    OPTIM.WARMUP=3step MODEL.EMA_DECAY=0.5 DATALOADER.SEED_SAMPLES=false
    DATALOADER.ON_BAD_SAMPLE=skip DETERMINISTIC=true
"""


@pytest.mark.parametrize("word", FREE.split())
def test_free_keys_are_told_and_never_stop_a_resume(
    word: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "launcher")
    check(word)
    assert f"changed since the checkpoint: {word.split('=')[0]}: " in caplog.text


@pytest.mark.parametrize("word", EXACT.split())
def test_what_would_break_exactness_is_refused_unless_allowed(word: str) -> None:
    key = word.split("=")[0]
    with pytest.raises(UsageError) as caught:
        check(word)
    assert caught.value.exit_code == 2
    assert str(caught.value).endswith(f"To go on all the same: --allow {key}")
    assert f"\n  {key}: " in str(caught.value)
    check(word, allow=key)


def test_the_allow_line_names_all_that_is_refused_and_nothing_else() -> None:
    words = ("SEED", 4, "LOG.EVERY", "7step", "TRAIN.BATCH_SIZE", 3, "OPTIM.LR", 0.5)
    with pytest.raises(UsageError) as caught:
        check(*words, allow="OPTIM.LR")
    assert str(caught.value).endswith("--allow SEED,TRAIN.BATCH_SIZE")
    assert "64 -> 3" in str(caught.value)
    check(*words, allow="OPTIM.LR,SEED,TRAIN.BATCH_SIZE")


def test_keys_of_the_task_that_came_or_went_are_refused() -> None:
    saved = config().dump().replace("TASK:\n", "TASK:\n  WIDTH: 3\n")
    assert "WIDTH" in saved
    with pytest.raises(UsageError, match=r"TASK\.WIDTH: 3 -> None"):
        check(saved=saved)


def test_a_data_set_of_another_length_is_refused_unless_allowed() -> None:
    for allow in ("", "X"):
        with pytest.raises(UsageError, match=r"DATASET_LENGTH: 9 -> 8\n.*--allow DATASET_LENGTH"):
            check(length=8, allow=allow)
    check(length=8, allow="DATASET_LENGTH")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of 10, 20 and 30, step 20 is the best."""
    made = Store(tmp_path / "checkpoints", Retention(5, 5, metric="val/loss"))
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.9)):
        made.save(step, **{"val/loss": loss})
    return made


def spoil(store: Store, *steps: int) -> None:
    for step in steps:
        os.truncate(store.path(step) / "state.pt", 9)


@pytest.mark.parametrize(
    ("which", "spoilt", "step"),
    [
        ("last", [], 30),
        ("best", [], 20),
        ("last", [30], 20),
        ("best", [20], 10),
        ("best", [20, 10], 30),
    ],
)
def test_choose_checkpoint(store: Store, which: str, spoilt: list[int], step: int) -> None:
    spoil(store, *spoilt)
    assert choose_checkpoint(store, which) == store.path(step)


def test_a_path_is_taken_as_it_is(store: Store) -> None:
    assert choose_checkpoint(store, "some/step_3") == Path("some/step_3")


@pytest.mark.parametrize(("which", "told"), [("last", "valid checkpoint in"), ("best", "val/loss")])
def test_no_valid_checkpoint(store: Store, which: str, told: str) -> None:
    spoil(store, 10, 20, 30)
    with pytest.raises(UsageError, match=told):
        choose_checkpoint(store, which)


def test_find_takes_this_runs_newest_then_the_one_named(store: Store, tmp_path: Path) -> None:
    empty = Store(tmp_path / "none")
    spoil(store, 30)
    found = find(store, True, store.path(10), ALONE)
    assert found is not None and found.step == 20 and list(found.damaged) == [30]
    for where, resume in ((empty, True), (empty, False), (store, False)):
        found = find(where, resume, store.path(10), ALONE)
        assert found is not None and found.step is None and same(found.state, state_of(10))
    assert find(empty, True, None, ALONE) is None


def test_resume_from_something_else_is_told(store: Store, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"no training state.*MODEL\.WEIGHTS"):
        find(store, False, tmp_path / "w.pt", ALONE)
    spoil(store, 20)
    with pytest.raises(RunError, match="--resume-from"):
        find(store, False, store.path(20), ALONE)
