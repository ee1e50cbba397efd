"""What debugging adds to a config, and what it leaves to the user."""

from __future__ import annotations

import pytest

from launcher.config import load_config
from launcher.debug.preset import PRESET, added, folder_of
from launcher.runtime.topology import Topology

TASK = ("TASK.NAME", "sine", "OUTPUT_DIR", "runs/mine")


def resolved(*words: str, dry: bool = False) -> dict[str, object]:
    cfg = load_config(None, [*TASK, *words]).cfg
    more = added(cfg, "/somewhere", dry)
    cfg = load_config(None, [*TASK, *words, *more]).cfg
    names = ("TRAIN", "EVAL", "CHECKPOINT", "DIST")
    found = {f"{n}.{key}": value for n in names for key, value in cfg[n].items()}
    return {**found, "OUTPUT_DIR": cfg.OUTPUT_DIR}


def test_nothing_is_added_where_nothing_asks_for_it() -> None:
    assert added(load_config(None, TASK).cfg, "/somewhere", False) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("DEBUG.OVERFIT_BATCHES", "3", "CHECKPOINT.METRIC", "val/accuracy"),
            {
                "TRAIN.SAMPLER": "sequential",
                "EVAL.SPLITS": ["train"],
                "CHECKPOINT.METRIC": "train_eval/accuracy",
            },
        ),
        (("DEBUG.OVERFIT_BATCHES", "3", "EVAL.EVERY", ""), {"EVAL.SPLITS": ["val"]}),
        (("DEBUG.BREAK_RANK", "0"), {"DIST.TRAIN_TIMEOUT": "1000h"}),
    ],
)
def test_what_keys_imply(words: tuple[str, ...], expected: dict[str, object]) -> None:
    found = resolved(*words)
    assert {key: found[key] for key in expected} == expected


def test_a_dry_run_is_a_step_of_the_config_elsewhere() -> None:
    found = resolved("OPTIM.WARMUP", "500step", "TRAIN.DURATION", "1000step", dry=True)
    assert found["TRAIN.DURATION"] == "1step" and found["OUTPUT_DIR"] == "/somewhere/run"
    assert found["EVAL.SAMPLES"] == found["EVAL.BATCH_SIZE"] and found["EVAL.EVERY"] == "1step"
    assert resolved("EVAL.EVERY", "", dry=True)["EVAL.EVERY"] == ""


def test_what_is_given_wins_over_the_preset() -> None:
    cfg = load_config(None, [*TASK, *PRESET, "TRAIN.DURATION", "3step"]).cfg
    assert cfg.TRAIN.DURATION == "3step" and cfg.DETERMINISTIC


def test_all_ranks_of_a_job_have_one_folder() -> None:
    ranks = [Topology(r, r, 2, 2, "torchrun", job_id="a:1/b") for r in range(2)]
    one, other = (folder_of(rank, "debug") for rank in ranks)
    assert one == other and one.count("/") == folder_of(Topology(), "debug").count("/")
