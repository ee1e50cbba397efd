"""The configs that ship: without mistakes, and those that are small train on 2 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher import cli
from launcher.config import load_config
from launcher.config.shipped import shipped
from launcher.tasks import BUILTIN, resolve_task
from tests.system import jobs

NAMES = [*shipped()]
# Those that a CPU trains, with what makes a few steps of them short.
SMALL = {
    "bytes-lm-1m": "TASK.CONTEXT=32 TASK.SHOW_BYTES=9 TRAIN.BATCH_SIZE=8 TRAIN.PRECISION=bf16",
    "digits": "",
    "digits-caption": "TRAIN.BATCH_SIZE=7",  # unequal shares, of unequal numbers of letters
    "digits_lenet": "",
    "image-list": "TASK.SIZE=16 TASK.WIDTH=8 TRAIN.BATCH_SIZE=6 TRAIN.PRECISION=fp32",
    "sine": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_without_mistakes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those too that only the task finds, which is made with the run."""
    assert cli.main(["train", "--config-file", name, "--check"]) == 0, capsys.readouterr().err
    config = load_config(name, (), resolve_task)
    assert config.task is not None and config.cfg.TASK.NAME in BUILTIN
    config.task(config.cfg)


def test_each_task_that_ships_has_a_config_and_each_model_of_the_digits() -> None:
    configs = [load_config(name, (), resolve_task).cfg for name in NAMES]
    assert {cfg.TASK.NAME for cfg in configs} == {*BUILTIN}
    models = [cfg.TASK.MODEL for cfg in configs if cfg.TASK.NAME == "digits"]
    assert sorted(models) == ["convnet", "lenet"]


def write_images(folder: Path) -> None:
    """Where configs/image-list.yaml looks for them."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for i, name in enumerate(("dark", "bright")):
            (folder / "images" / split / name).mkdir(parents=True)
            for k in range(6):
                pixels = image.effect_noise((20 + k, 24), 40 + 80 * i)
                pixels.save(folder / "images" / split / name / f"{k}.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_trains_on_two_ranks(name: str, tmp_path: Path) -> None:
    if name == "image-list":
        write_images(tmp_path)
    run = tmp_path / "run"
    short = "TRAIN.DURATION=4step LOG.EVERY=2step EVAL.EVERY=2step EVAL.SAMPLES=24 OPTIM.WARMUP="
    words = ["train", "--config-file", name, f"OUTPUT_DIR={run}", *short.split()]
    env = {"OMP_NUM_THREADS": "1"}
    with jobs.Group([*words, *SMALL[name].split()], 2, env, tmp_path) as job:
        job.wait().ok()
    assert jobs.status(run)["state"] == "completed"
    records = jobs.metrics(run)
    trained = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in trained] == [2, 4]
    assert not any("nonfinite" in record for record in records)
    told = load_config(name, (), resolve_task).task.metrics()
    evaluated = [r for r in records if "val/loss" in r]
    assert [r["step"] for r in evaluated] == [2, 4]
    assert all(f"val/{metric}" in record for record in evaluated for metric in told)
    shows = {"bytes-lm-1m": "val/sample", "digits-caption": "val/attention"}
    if tag := shows.get(name):
        events = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
        assert tag in events["images"] + events["tensors"]
    # What bytes-lm computes is told without counting.
    assert ("perf/flops_per_s" in trained[0]) is (name == "bytes-lm-1m")


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute where nothing else runs
def test_the_digits_are_spelled(tmp_path: Path) -> None:
    """More than nine in ten without a mistake."""
    run = tmp_path / "run"
    words = ["train", "--config-file", "digits-caption", f"OUTPUT_DIR={run}"]
    with jobs.Forked(words, {"OMP_NUM_THREADS": "1"}, tmp_path) as job:
        job.wait(800).ok()
    exact = jobs.values(run, "val/exact_match")
    assert exact[max(exact)] > 0.95
    assert jobs.values(run, "val/edit_rate")[max(exact)] < 0.05
