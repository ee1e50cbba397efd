"""Which weights train when, against plain torch, and over resumes around the switch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import Task
from launcher.errors import UsageError
from launcher.models.freezing import Freezing
from launcher.runtime.progress import Progress
from tests.edges.test_zoo import same
from tests.engine.helpers import LENGTH, Plan, Regression, Trainer, assert_close, config, drawn
from tests.system import jobs
from tests.system.exact import records

FAIL_AT = "LAUNCHER_TEST_FAIL_AT"


class Backbone(Regression):
    """A norm in what is frozen, and one that is not."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        return nn.ModuleDict({"body": body, "neck": nn.BatchNorm1d(8), "head": nn.Linear(8, 1)})

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        out = model["head"](model["neck"](model["body"](x)))
        return {"loss": (out - y).square().mean()}


class Adam(Backbone):
    def build_optimizer(self, model: nn.Module) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, 0.01, weight_decay=0.1)


def by_hand(task: Any, thaws: dict[int, list[str]], steps: int) -> nn.Module:
    model: Any = task.build_model()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    adam = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    optimizer = adam if isinstance(task, Adam) else sgd
    model["body"].requires_grad_(False)[1].eval()
    plan = Plan(LENGTH, 8)
    for step in range(steps):
        for name in thaws.get(step, ()):
            model.get_submodule(name).requires_grad_(True).train()
        epoch, k = divmod(step, plan.steps_per_epoch)
        optimizer.zero_grad()
        task.train_step(model, drawn(task, epoch, *plan.batch(k)))["loss"].backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", [Backbone, Adam])
@pytest.mark.parametrize(
    ("entries", "thaws"),
    [
        ([], {}),
        (["body@3step"], {3: ["body"]}),
        (["body.1@1step", "body.0.*@1ep"], {1: ["body.1"], 3: ["body.0"]}),
    ],
)
def test_weights_train_when_they_are_to(
    kind: type[Backbone], entries: list[str], thaws: dict[int, list[str]]
) -> None:
    words = ("MODEL.FREEZE", "[body]", "MODEL.THAW", str(entries), "OPTIM.WEIGHT_DECAY", 0.01)
    trainer = Trainer(kind(), *words)
    for step in range(6):
        trainer.state.progress.__dict__.update(step=step, epoch=step // 3)
        trainer.one(step)
    expected = by_hand(kind(), thaws, 6)
    assert_close(trainer.weights, [p.detach() for p in expected.parameters()])
    for ours, theirs in zip(trainer.state.model.buffers(), expected.buffers(), strict=True):
        assert_close([ours.double()], [theirs.double()])
    modes = [m.training for m in expected.modules()]
    assert [m.training for m in trainer.state.model.modules()] == modes


def test_what_build_model_froze_may_be_thawed_too() -> None:
    class Own(Backbone):
        def build_model(self) -> nn.Module:
            model: Any = super().build_model()
            model["body"].requires_grad_(False)
            return model

    trainer = Trainer(Own(), "MODEL.THAW", "[body.0@2step]")
    before = [p.requires_grad for p in trainer.state.model.parameters()]
    trainer.state.progress.step = 2
    trainer.one(2)
    after = [p.requires_grad for p in trainer.state.model.parameters()]
    assert before == [False] * 4 + [True] * 4 and after == [True] * 2 + [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    ("freeze", "thaw", "told"),
    [
        (["bodi"], [], r"'bodi' fits no weight of the model; near it are body"),
        ([], ["head@2step"], r"MODEL\.THAW head@2step: nothing of that is frozen"),
        (["body"], ["tail@2step"], r"'tail' fits no weight of the model"),
    ],
)
def test_names_that_fit_nothing_are_told(freeze: list[str], thaw: list[str], told: str) -> None:
    cfg = config("MODEL.FREEZE", freeze, "MODEL.THAW", thaw)
    with pytest.raises(UsageError, match=told):
        Freezing(cfg, Backbone().build_model())


def test_tied_weights_and_norms_without_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    freezing = Freezing(config("MODEL.FREEZE", "[0]"), model)
    freezing.begin([])
    assert not model[2].weight.requires_grad and model[2].bias.requires_grad
    assert model[1].training and not freezing.thaw(Progress())
    inside = nn.Sequential(model)
    Freezing(config("MODEL.FREEZE", "['0']"), inside).begin([])
    assert not model[1].training  # a norm of what is frozen, though it has no weights


class Frozen(Task):
    """Dropout, a norm and momenta, so that all that could go wrong at a switch would show."""

    def build_model(self) -> nn.Module:
        body = nn.Sequential(nn.Linear(4, 300), nn.BatchNorm1d(300), nn.Dropout(0.2))
        return nn.ModuleDict({"body": body, "head": nn.Linear(300, 1)})

    def build_dataset(self, split: str) -> TensorDataset:
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        if self.recorder.step == int(os.environ.get(FAIL_AT, "-1")):
            raise ValueError("a planned failure")
        out = model["head"](model["body"](batch[0]))
        return {"loss": (out - batch[1]).square().mean()}

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": (model["head"](model["body"](batch[0])) - batch[1]).square().squeeze(1)}


WORDS = (
    *("train", "TASK.NAME", f"{__file__}:Frozen", "TRAIN.BATCH_SIZE", 10, "TRAIN.DURATION", "2ep"),
    *("MODEL.FREEZE", "[body]", "MODEL.THAW", "['body@4step']", "CHECKPOINT.EVERY", "1step"),
    *("CHECKPOINT.KEEP_LAST", 20, "LOG.EVERY", "1step", "OPTIM.LR", 0.01, "LOG.TENSORBOARD", False),
    *("MODEL.EMA_DECAY", 0.5, "EVAL.EVERY", "3step"),
)


@pytest.mark.parametrize("ranks", [1, jobs.slow(2)])
@pytest.mark.parametrize(
    "fails", [jobs.slow(4), 5, jobs.slow(6)]
)  # resumed before, at and after the switch
def test_a_resume_around_the_switch_is_exact(ranks: int, fails: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def train(run: Path, *more: object, env: dict[str, str] | None = None) -> jobs.Ended:
        words, env = [*WORDS, "OUTPUT_DIR", run, *more], {"OMP_NUM_THREADS": "1", **(env or {})}
        with jobs.Group(words, ranks, env) if ranks > 1 else jobs.Forked(words, env) as job:
            return job.wait()

    train(whole).ok()
    assert "a planned failure" in train(broken, env={FAIL_AT: str(fails)}).output
    assert jobs.checkpoint_steps(broken)[-1] == fails - 1
    train(broken, "--resume").ok()
    ours, theirs = jobs.state(broken), jobs.state(whole)
    for part in ("model", "optimizer", "ema", "progress"):
        assert same(ours[part], theirs[part]), part
    assert records(broken) == records(whole)
    frozen, thawed = jobs.state(whole, 4)["model"], theirs["model"]
    start = jobs.state(whole, 1)["model"]
    for name in ("body.0.weight", "body.1.running_mean"):
        assert same(frozen[name], start[name]) and not same(frozen[name], thawed[name])
