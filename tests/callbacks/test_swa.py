"""Averages of the weights, beside those of torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import TensorDataset

from launcher import Task
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.edges.model import averaged
from tests.edges.test_zoo import same
from tests.engine.helpers import config
from tests.system import jobs
from tests.system.exact import records


class Normed(Task):
    """Batch-norm, dropout, and its weights after each step written down."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        parts = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2)
        self.model = nn.Sequential(*parts)
        return self.model

    def build_dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(len(split))
        x = torch.randn(44, 4, generator=made)
        return TensorDataset(x, (x.sum(1) > 0).long())

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        self.recorder.scalar("seen", len(batch[0]))
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")}

    def on_step(self) -> None:
        if self.run.rank == 0:
            place = Path(self.cfg.OUTPUT_DIR) / f"step{self.run.progress.step}.pt"
            torch.save(self.model.state_dict(), place)


def words(run: Path, *more: object) -> list[object]:
    place = ("TASK.NAME", f"{__file__}:Normed", "OUTPUT_DIR", run, "DATALOADER.NUM_WORKERS", 0)
    sizes = ("TRAIN.BATCH_SIZE", 8, "TRAIN.DURATION", "5ep", "LOG.EVERY", "1step")
    swa = ("MODEL.SWA_START", "2ep", "MODEL.SWA_EVERY", "4step", "MODEL.SWA_BN_BATCHES", 3)
    kept = ("CHECKPOINT.EVERY", "7step", "CHECKPOINT.KEEP_LAST", 9)
    return [*place, *sizes, *swa, "EVAL.BATCH_SIZE", 10, *kept, *more]


def by_hand(run: Path, last: int) -> AveragedModel:
    """The average of the weights at every fourth step of epochs 3 and later, of 6 steps each."""
    task = Normed(config("OUTPUT_DIR", run))
    model = task.build_model()
    average = AveragedModel(model)
    for step in range(12, last + 1, 4):
        model.load_state_dict(torch.load(run / f"step{step}.pt"))
        average.update_parameters(model)
    return average


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("swa") / "run"
    jobs.train(*words(run)).ok()
    return run


def weights(run: Path, step: int | None = None) -> dict[str, Any]:
    state = jobs.state(run, step) if step else jobs.state(run)
    return {n.removeprefix("module."): v for n, v in state["ema"].items() if n != "n_averaged"}


def test_the_mean_of_the_weights(run: Path) -> None:
    average = by_hand(run, 28)
    assert jobs.state(run)["ema"]["n_averaged"] == 5
    found = weights(run)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-7)


def test_batch_norm_has_the_statistics_of_training_data_under_it(run: Path) -> None:
    """Of the first three batches of ten, in the order of epoch 0, as torch's update_bn."""
    import numpy as np

    from launcher.data.order import Shuffle

    model = Normed(config("OUTPUT_DIR", run)).build_model()
    model.load_state_dict(weights(run))
    for norm in model.modules():
        if isinstance(norm, nn.Dropout):
            norm.p = 0.0  # which update_bn leaves in training mode
    order = Shuffle(44, 0)(0, np.arange(30))
    data = Normed(config()).build_dataset("train")
    update_bn([data[order[k : k + 10]] for k in (0, 10, 20)], model)
    found, expected = weights(run), model.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        torch.testing.assert_close(found[name], expected[name])
    # The model trains on with its own.
    assert not torch.equal(found["1.running_mean"], jobs.state(run)["model"]["1.running_mean"])


def test_what_is_evaluated(run: Path) -> None:
    """The model until there is an average, then that; and a checkpoint holds what is evaluated."""
    found = jobs.values(run, "val/loss")
    data = Normed(config()).build_dataset("val")
    x, y = data.tensors
    for step in (6, 30):
        model = Normed(config("OUTPUT_DIR", run)).build_model()
        model.load_state_dict(torch.load(run / "step6.pt") if step == 6 else weights(run))
        loss = nn.functional.cross_entropy(model.eval()(x), y)
        assert found[step] == pytest.approx(loss.item(), rel=1e-5)
    assert same(weights(run, 7), dict(torch.load(run / "step7.pt")))


def test_the_training_is_the_same_without(run: Path, tmp_path: Path) -> None:
    jobs.train(*words(tmp_path / "run", "MODEL.SWA_START", "")).ok()
    assert same(jobs.state(tmp_path / "run")["model"], jobs.state(run)["model"])
    assert "train/seen" not in records(run)[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_exactly(ranks: int, run: Path, tmp_path: Path) -> None:
    """With two ranks also with loader workers, as many threads as without."""
    broken, whole = tmp_path / "run", run
    how: dict[str, Any] = {"ranks": ranks} if ranks > 1 else {}
    if ranks > 1:
        whole = tmp_path / "whole"
        jobs.train(*words(whole), **how).ok()
    more = ("DATALOADER.NUM_WORKERS", ranks - 1)
    with jobs.start(*words(broken, *more), **how) as job:
        jobs.wait_for_save(broken, 14, job)
        job.kill()
    jobs.train(*words(broken, *more), "--resume", **how).ok()
    assert same(jobs.state(broken)["ema"], jobs.state(whole)["ema"])
    assert records(broken) == records(whole)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("TASK.NAME", f"{__file__}:Unevaluated"), "MODEL.SWA_BN_BATCHES goes through eval_step"),
        (("TASK.NAME", f"{__file__}:Stream"), "an iterable data set is read once"),
        (("MODEL.EMA_DECAY", 0.9), "weights are averaged in one way"),
    ],
)
def test_what_cannot_be_is_refused(more: Any, told: str, tmp_path: Path) -> None:
    ended = jobs.train(*words(tmp_path / "run", "EVAL.EVERY", "", *more))
    assert ended.code == 2 and told in ended.err


class Unevaluated(Normed):
    eval_step = None  # type: ignore[assignment]


class Stream(Normed):
    def build_dataset(self, split: str) -> Any:
        class Read(torch.utils.data.IterableDataset):
            def __len__(self) -> int:
                return 44

            def __iter__(self) -> Any:
                return iter([(torch.ones(4), 1)] * 44)

        return Read()


def test_the_average_is_exported_and_is_the_best(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "average.pt"
    jobs.launch("checkpoint", "export", "-o", place, "--ema", run / "checkpoints/step_30").ok()
    exported = torch.load(place)
    assert same(dict(exported.get("model", exported)), weights(run))
    store = CheckpointStore(run / "checkpoints", Retention.from_config(config()))
    best = store.manifest(30)["metrics"]["val/loss"]
    assert best == jobs.values(run, "val/loss")[30]


def test_a_moving_average_that_warms_up() -> None:
    """Its decay is (1 + n) / (10 + n) after n updates, until that is MODEL.EMA_DECAY."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = averaged(model, 0.4, warmup=True)
    expected = None
    for n in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        decay = min(0.4, (1 + n) / (10 + n))
        # The first update copies the weights, as torch's AveragedModel does.
        pairs = zip(expected or now, now, strict=True)
        expected = [decay * a + (1 - decay) * b for a, b in pairs]
        torch.testing.assert_close([p.detach() for p in ema.module.parameters()], expected)
    assert same(copy.deepcopy(ema).state_dict()["n_averaged"], torch.tensor(8))
