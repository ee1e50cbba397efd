"""Evaluation sets of whole runs: several, none, bounded, at the start, and the raw weights too."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from launcher import Task
from launcher.cli import main
from launcher.models.weights import load_weights
from tests.system import jobs
from tests.system.exact import records


class Counted(Dataset):
    """Says which of it were taken; told epochs, as an augmentation that gets stronger is."""

    def __init__(self, split: str, length: int) -> None:
        self.split, self.length, self.epoch = split, length, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        x = torch.tensor([index / self.length, len(self.split) / 10])
        return x, x.sum(0, keepdim=True) + self.epoch, index


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from (Counted("stream", 100)[i] for i in range(1000))


class Sets(Task):
    """A line; every split has its own length."""

    lengths = MappingProxyType({"train": 20, "val": 9, "test": 7, "other": 30})

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def build_dataset(self, split: str) -> Any:
        return Stream() if split == "stream" else Counted(split, self.lengths[split])

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        return {"loss": (model(x) - y).square().mean()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y, index = batch
        return {"loss": (model(x) - y).square().squeeze(1), "index": index}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert outputs["index"].tolist() == list(range(len(outputs["index"])))
        return {"samples": len(outputs["index"])}


class NoEvaluation(Task):
    build_model, train_step = Sets.build_model, Sets.train_step

    def build_dataset(self, split: str) -> Any:
        assert split == "train"
        return Counted(split, 20)


def words(run: Path, name: str = "Sets", *more: object) -> list[str]:
    common = (
        "TRAIN.BATCH_SIZE",
        8,
        "TRAIN.DURATION",
        "2ep",
        "EVAL.BATCH_SIZE",
        4,
        "OPTIM.LR",
        0.05,
    )
    task = ("TASK.NAME", f"{__file__}:{name}", "OUTPUT_DIR", run, "LOG.TENSORBOARD", False)
    return ["train", *map(str, (*common, *task, *more))]


SETS = ("EVAL.SPLITS", "[train, val, test]", "EVAL.SAMPLES", 8, "MODEL.EMA_DECAY", 0.8)


def by_hand(run: Path, step: int, split: str, raw: bool = False) -> float:
    """The loss of a split's first 8 samples by the weights of a checkpoint."""
    model = nn.Linear(2, 1)
    load_weights(run / f"checkpoints/step_{step}", model, ema=not raw)
    data = Counted(split, Sets.lengths[split])
    samples = [data[i] for i in range(min(8, len(data)))]
    with torch.no_grad():
        return sum(((model(x) - y) ** 2).item() for x, y, _ in samples) / len(samples)


def test_sets_stand_under_their_names_and_the_raw_weights_beside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("EVAL.AT_START", True, "EVAL.RAW", True, "CHECKPOINT.METRIC", "test_raw/loss")
    assert main(words(run, "Sets", *SETS, *more)) == 0
    evaluations = [record for record in jobs.metrics(run) if "val/loss" in record]
    assert [record["step"] for record in evaluations] == [0, 3, 6]
    sizes = {"train_eval": 8, "val": 8, "test": 7}
    for record in evaluations:
        found = {key for key in record if key.endswith(("/loss", "/samples"))}
        names = [
            f"{s}{raw}/{m}" for s in sizes for raw in ("", "_raw") for m in ("loss", "samples")
        ]
        assert found == set(names)
        assert {s: record[f"{s}/samples"] for s in sizes} == sizes
    for step in jobs.checkpoint_steps(run):
        (record,) = (r for r in evaluations if r["step"] == step)
        for split, name in (("train", "train_eval"), ("val", "val"), ("test", "test")):
            assert record[f"{name}/loss"] == pytest.approx(by_hand(run, step, split), rel=1e-5)
            raw = by_hand(run, step, split, raw=True)
            assert record[f"{name}_raw/loss"] == pytest.approx(raw, rel=1e-5)
    assert main(["runs", "verify", str(run)]) == 0
    capfd.readouterr()
    assert (
        main([*words(run, "Sets", *SETS, "EVAL.SAMPLES", 0), "--eval-only", "--split", "other"])
        == 0
    )
    measured = json.loads(capfd.readouterr().out)
    assert measured.keys() == {"other/loss", "other/samples"} and measured["other/samples"] == 30
    assert main([*words(run, "Sets", *SETS), "--eval-only", "--split", "val,train"]) == 0
    measured = json.loads(capfd.readouterr().out)
    last = {k: v for k, v in evaluations[-1].items() if k.startswith(("val/", "train_eval/"))}
    assert measured == last


def test_the_training_goes_on_as_if_it_were_never_evaluated(tmp_path: Path) -> None:
    """The training data among the sets are told epochs of their own."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    more = ("EVAL.EVERY", "1step", "EVAL.AT_START", True, "CHECKPOINT.KEEP_BEST", 0)
    assert main(words(whole, "Sets", *SETS, *more)) == 0
    assert main(words(bare, "Sets", *SETS, "EVAL.SPLITS", "[]")) == 0
    ours, theirs = jobs.state(whole), jobs.state(bare)
    assert all(torch.equal(ours["model"][name], v) for name, v in theirs["model"].items())
    trained = [
        [{k: v for k, v in r.items() if k.startswith("train/")} for r in records(run)]
        for run in (whole, bare)
    ]
    assert [r for r in trained[0] if r] == [r for r in trained[1] if r]
    assert not any(key.startswith(("val", "test")) for r in jobs.metrics(bare) for key in r)


def test_a_task_that_is_never_evaluated_needs_nothing_for_it(tmp_path: Path) -> None:
    assert main(words(tmp_path / "run", "NoEvaluation", "EVAL.SPLITS", "[]")) == 0
    told = jobs.train(*words(tmp_path / "run", "NoEvaluation")[1:], "--overwrite")
    assert told.code == 2 and "has no eval_step" in told.err


def test_a_stream_is_evaluated_as_far_as_it_is_bounded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert (
        main(
            words(
                run,
                "Sets",
                "EVAL.SPLITS",
                "[stream]",
                "EVAL.SAMPLES",
                11,
                "CHECKPOINT.METRIC",
                "stream/loss",
            )
        )
        == 0
    )
    assert set(jobs.values(run, "stream/samples").values()) == {11}
    assert main([*words(run, "Sets"), "--eval-only", "--split", "stream"]) == 2
    assert "or set EVAL.SAMPLES" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("EVAL.SPLITS", "[val, val]"), "'val' stands twice"),
        (("EVAL.SPLITS", "[val/x]"), "'val/x' is no name"),
        (("EVAL.SPLITS", "[perf]"), "the launcher's own"),
        (("EVAL.SPLITS", "[]", "--eval-only"), "EVAL.SPLITS names nothing to evaluate"),
        (("EVAL.AT_START", "True", "EVAL.EVERY", ""), "needs EVAL.EVERY and EVAL.SPLITS"),
        (("--split", "val"), "--split is for --eval-only"),
        (("MODEL.THAW", "[body@3min]"), "body@3min' is no moment"),
        (("MODEL.THAW", "[body]"), "body' is no moment"),
    ],
)
def test_what_makes_no_sense_is_told(
    more: tuple[str, ...], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "run", "Sets", *more)) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_in_its_first_evaluation_starts_over(tmp_path: Path) -> None:
    """At step 0 there is nothing to go on from; at a checkpoint of step 0 it is not done again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = (*SETS, "EVAL.AT_START", True, "CHECKPOINT.EVERY", "1step", "CHECKPOINT.KEEP_LAST", 9)
    assert main(words(whole, "Sets", *more)) == 0
    assert jobs.checkpoint_steps(whole) == [*range(7)]  # step 0 was the best so far
    fresh = words(broken, "Sets", *more)
    at_0 = [*fresh, "--resume-from", str(whole / "checkpoints/step_0"), "EVAL.EVERY", "1ep"]
    assert main(at_0) == 0
    assert records(broken) == [r for r in records(whole) if r["step"] > 0]
