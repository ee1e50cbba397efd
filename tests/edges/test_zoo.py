"""Other people's models, optimisers and batches: taken whole, or refused before the first step."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli import main
from launcher.edges.model import check_model
from launcher.edges.state import plain
from launcher.models.weights import load_weights
from tests.edges import zoo
from tests.system import jobs
from tests.system.exact import records

TASK = f"{zoo.__file__}:Zoo"
COMMON = (
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "7step", "CHECKPOINT.EVERY", "3step"),
    *("LOG.EVERY", "2step", "EVAL.EVERY", "4step", "LOG.TENSORBOARD", "False"),
    *("CHECKPOINT.KEEP_LAST", "9", "TRAIN.DROP_LAST", "True", "TRAIN.GRAD_CLIP", "1.0"),
    *("DATALOADER.NUM_WORKERS", "0"),
)


def words(parts: list[str], optimiser: str, batch: str) -> list[str]:
    task = ("TASK.NAME", TASK, "TASK.PARTS", json.dumps(parts))
    return [*task, "TASK.OPTIMISER", optimiser, "TASK.BATCH", batch, *COMMON]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, classes and layouts of tensors included."""
    if isinstance(a, torch.Tensor):
        if a.is_quantized:
            a, b = a.int_repr(), b.int_repr()
        if a.is_sparse:
            a, b = a.to_dense(), b.to_dense()
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(run: Path, reference: Path) -> None:
    ours, theirs = jobs.state(run), jobs.state(reference)
    for part in ("model", "optimizer", "ema", "progress"):
        assert same(ours[part], theirs[part]), part
    assert records(run) == records(reference)
    assert all(record.get("train/whole", 2**53 - 1) == 2**53 - 1 for record in records(run))


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], None]:
    return lambda case: _check(case, tmp_path, monkeypatch, capfd)


def _check(
    case: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Train it; crash, resume and compare; evaluate; take the weights out and put them back."""
    whole, broken = folder / "whole", folder / "broken"
    assert main(["train", *case, "OUTPUT_DIR", str(whole)]) == 0
    monkeypatch.setenv(zoo.FAIL_AT, "5")
    assert main(["train", *case, "OUTPUT_DIR", str(broken)]) == 1
    monkeypatch.delenv(zoo.FAIL_AT)
    assert main(["train", *case, "OUTPUT_DIR", str(broken), "--resume"]) == 0
    assert_same_run(broken, whole)
    capfd.readouterr()
    assert main(["train", *case, "OUTPUT_DIR", str(whole), "--eval-only"]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert measured["val/numpy"] == 1.0 and measured == {
        key: value for key, value in records(whole)[-1].items() if key.startswith("val/")
    }
    out = folder / "weights.pt"
    assert main(["checkpoint", "verify", str(whole)]) == 0
    assert main(["checkpoint", "export", str(whole / "checkpoints/last"), "-o", str(out)]) == 0
    parts = json.loads(case[case.index("TASK.PARTS") + 1])
    fresh = zoo.Net(parts)
    check_model(fresh)  # nothing can be loaded into what `expand` gave, here as in torch
    load_weights(out, fresh)
    expected = jobs.state(whole)["model"]
    found = plain(fresh.state_dict())
    assert all(same(value, expected[name]) for name, value in found.items())


# Sparse gradients go with optimisers that take them, as in torch alone.
SPARSE = ("plain sgd", "adagrad", "no rate")


def fits(parts: list[str], optimiser: str) -> bool:
    return "sparse" not in parts or optimiser in SPARSE


@pytest.mark.parametrize("part", [part for part in zoo.MODELS if part not in zoo.REFUSED])
def test_a_model_of_any_kind_is_saved_resumed_evaluated_and_exported(
    part: str, check: Callable[[list[str]], None]
) -> None:
    check(words([part], "plain sgd" if part == "sparse" else "adam", "tuple"))


@pytest.mark.parametrize("optimiser", [name for name in zoo.OPTIMISERS if name not in zoo.REFUSED])
def test_an_optimiser_of_any_make_goes_on_exactly(
    optimiser: str, check: Callable[[list[str]], None]
) -> None:
    check(words(["extra"], optimiser, "tuple"))


@pytest.mark.parametrize("batch", zoo.BATCHES)
def test_a_batch_of_any_class_trains(batch: str, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("tuple", batch.replace(" ", "_") + "_")]
    for run, kind in zip(runs, ("tuple", batch), strict=True):
        case = [*words([], "sgd", kind), "DATALOADER.NUM_WORKERS", "1"]
        assert main(["train", *case, "OUTPUT_DIR", str(run)]) == 0
    assert same(*(jobs.state(run)["model"] for run in runs))


@pytest.mark.parametrize("kind", zoo.REFUSED)
def test_what_could_not_be_loaded_again_is_refused_before_anything_is_made(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts, optimiser = ([], kind) if kind in zoo.OPTIMISERS else ([kind], "sgd")
    run = tmp_path / "run"
    assert main(["train", *words(parts, optimiser, "tuple"), "OUTPUT_DIR", str(run)]) == 2
    told = capfd.readouterr().err
    assert zoo.REFUSED[kind] in told and "Traceback" not in told
    assert not run.exists()


# How a run may be made, beside its parts.
WAYS = {
    "MODEL.EMA_DECAY": ("0.0", "0.9"),
    "TRAIN.GRAD_CLIP": ("0.0", "0.5"),
    "TRAIN.MICRO_BATCH_SIZE": ("0", "3"),
    "TRAIN.DROP_LAST": ("True", "False"),
    "OPTIM.SCHEDULE": ("constant", "cosine"),
    "OPTIM.WARMUP": ("", "2step"),
    "SEED": ("0", "5"),
    "DATALOADER.NUM_WORKERS": ("0", "0", "1"),
}


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 2000))]
)
def test_random_tasks_are_exact_or_refused(
    seed: int, tmp_path: Path, check: Callable[[list[str]], None]
) -> None:
    draw = random.Random(seed)
    for _ in itertools.count():
        parts = draw.sample(zoo.MODELS, draw.randint(0, 5))
        optimiser = draw.choice(list(zoo.OPTIMISERS))
        if fits(parts, optimiser):
            break
    case = words(parts, optimiser, draw.choice(zoo.BATCHES))
    for key, values in WAYS.items():
        case += [key, draw.choice(values)]
    if not {*parts, optimiser} & zoo.REFUSED.keys():
        check(case)
        return
    assert main(["train", *case, "OUTPUT_DIR", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
