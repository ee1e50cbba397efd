"""The step: the weights of one large batch, whatever it is cut into; what spoils a step."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launcher.data.plan import Plan
from launcher.errors import RunError
from tests.engine.helpers import Regression, Trainer, assert_close, by_hand, drawn, evaluation, same

SGD = {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("micro", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch", [1, 7, 8, 23, 64])
def test_weights_are_those_of_one_large_batch(batch: int, micro: int, weighted: bool) -> None:
    """Four steps reach an epoch's last, smaller batch and the next epoch. Whole micro-batches have
    no weight at all."""
    task = Regression(weighted)
    trainer = Trainer(task, batch=batch, micro=micro)
    trainer.run(4)
    assert_close(trainer.weights, by_hand(task, batch, 4, **SGD))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("micro", [0, 3])
def test_recorded_values_are_means_over_the_large_batch(micro: int, weighted: bool) -> None:
    task = Regression(weighted)
    trainer = Trainer(task, micro=micro)
    loss = task.train_step(trainer.state.model, drawn(task, 0, 0, 8))["loss"].item()
    trainer.run(1)
    recorded = trainer.recorded()
    assert recorded["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert recorded["train/error"] == pytest.approx(loss, rel=1e-6)


def test_a_batch_without_weight_changes_nothing() -> None:
    """A batch of padding alone: weight 0 and loss 0. No gradient comes of it, not even a NaN."""
    task = Regression(weighted=True)
    task.w = torch.zeros_like(task.w)
    trainer = Trainer(task, "OPTIM.MOMENTUM", 0, micro=3)
    before = trainer.weights
    trainer.run(1)
    assert_close(trainer.weights, before)


@pytest.mark.parametrize("clip", [0.01, 0.5, 1e6])
def test_clipping_is_torchs(clip: float) -> None:
    task = Regression()
    words = ("TRAIN.GRAD_CLIP", clip, "OPTIM.MOMENTUM", 0, "OPTIM.LR", 1)
    trainer = Trainer(task, *words, micro=3)
    model = copy.deepcopy(trainer.state.model)
    task.train_step(model, drawn(task, 0, 0, 8))["loss"].backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    trainer.run(1)
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert_close(trainer.weights, [*model.parameters()])
    # What is recorded is the norm before clipping.
    assert trainer.recorded()["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_average_of_the_weights() -> None:
    """The first update copies the weights, as torch's AveragedModel does; then the formula."""
    trainer = Trainer(Regression(), "MODEL.EMA_DECAY", 0.9)
    trainer.one(0)
    average = trainer.weights
    for step in (1, 2, 3):
        trainer.one(step)
        average = [0.9 * a + 0.1 * w for a, w in zip(average, trainer.weights, strict=True)]
    assert trainer.state.ema is not None
    assert_close([p.detach() for p in trainer.state.ema.module.parameters()], average)


class Overflow(Regression):
    """The loss of the second step is infinite."""

    calls = 0

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        values = super().train_step(model, batch)
        self.calls += 1
        return {**values, "loss": values["loss"] * (torch.inf if self.calls == 2 else 1.0)}


def test_a_step_skipped_by_the_scaler_changes_nothing() -> None:
    trainer = Trainer(Overflow(), "TRAIN.PRECISION", "fp16", "MODEL.EMA_DECAY", 0.9)
    ema = trainer.state.ema
    assert ema is not None
    assert trainer.one(0)[0] is False

    def changing() -> tuple[Any, ...]:
        return trainer.weights, trainer.state.optimizers[""].state_dict(), ema.state_dict()

    before = copy.deepcopy(changing())
    assert trainer.one(1, frozenset({"stop"})) == (True, {"stop"})
    assert same(changing(), before)
    assert trainer.one(2)[0] is False
    assert not same(trainer.weights, before[0])
    # Nor is its norm counted.
    assert 0 < trainer.recorded()["train/grad_norm"] < float("inf")


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_other_precisions_come_close(precision: str, weighted: bool) -> None:
    task = Regression(weighted)
    trainer = Trainer(task, "TRAIN.PRECISION", precision, micro=3)
    # torch's first scale is meant to be too large at first; this one is not.
    trainer.step.phases[0].scaler = torch.amp.GradScaler("cpu", 256.0, enabled=precision == "fp16")
    assert [skipped for skipped, _ in trainer.run(2)] == [False, False]
    assert all(w.dtype == torch.float32 for w in trainer.weights)
    assert_close(trainer.weights, by_hand(task, 8, 2, **SGD), rtol=0.05, atol=0.02)


class Says(Regression):
    """Returns what it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def train_step(self, model: nn.Module, batch: Any) -> Any:
        return self.answer(model(batch[0]).squeeze(1))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda out: out.mean(), "must return a dict with a 'loss', not Tensor"),
        (lambda out: None, "must return a dict with a 'loss', not NoneType"),
        (lambda out: {"error": out.mean()}, "must return a dict with a 'loss'"),
        (lambda out: {"loss": out}, r"scalars; 'loss' is \(8,\)"),
        (lambda out: {"loss": out.mean(), "acc": out}, r"scalars; 'acc' is \(8,\)"),
        (lambda out: {"loss": 1.0}, "'loss' that depends on no weight"),
    ],
)
def test_a_bad_train_step_is_told(answer: Any, told: str) -> None:
    with pytest.raises(RunError, match=rf"Says\.train_step .*{told}") as caught:
        Trainer(Says(answer)).run(1)
    assert caught.value.exit_code == 1


def test_requests_come_back_once() -> None:
    asked = [frozenset(), frozenset({"stop", "record"}), frozenset({"checkpoint"}), frozenset()]
    trainer = Trainer(Regression(), micro=3)
    assert [trainer.one(step, names)[1] for step, names in enumerate(asked)] == asked


@pytest.mark.parametrize(
    ("in_eval", "modes"), [("1", [True, False, True]), ("", [True, True, True])]
)
def test_a_module_that_the_task_put_into_eval_mode_stays_there(
    in_eval: str, modes: list[bool]
) -> None:
    """A frozen batch-norm, say; a whole model in eval mode, as a pretrained one comes, trains."""
    task: Any = Regression()
    model = task.build_model()
    model.get_submodule(in_eval).eval()
    task.build_model = lambda: model
    trainer = Trainer(task)
    for _ in range(2):
        trainer.run(1)
        assert [module.training for module in model] == modes
        evaluation(task, [task.build_dataset()[:]], Plan(23, 23))(model, ["val"])
        assert [module.training for module in model] == modes


@pytest.mark.parametrize("value", [3, np.float32(0.1), np.int64(2**53), 1 / 3])
def test_numbers_of_python_and_numpy_are_recorded_exactly(value: Any) -> None:
    trainer = Trainer(Says(lambda out: {"loss": out.mean(), "value": value}), batch=1)
    trainer.run(1)
    assert trainer.recorded()["train/value"] == float(value)


@pytest.mark.parametrize("trains", [False, True], ids=["thawed", "frozen"])
def test_weights_that_are_switched_while_training_are_an_error_at_that_step(trains: bool) -> None:
    class Switches(Regression):
        due = False

        def build_model(self) -> nn.Module:
            model = super().build_model()
            next(model.parameters()).requires_grad_(trains)
            return model

        def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
            if self.due:
                next(model.parameters()).requires_grad_(not trains)
            return super().train_step(model, batch)

    task = Switches()
    trainer = Trainer(task)
    trainer.run(2)
    task.due = True
    before = [p.clone() for p in trainer.state.model.parameters()]
    with pytest.raises(RunError, match=r"requires_grad of .*weight was switched.*MODEL\.THAW"):
        trainer.run(1)
    assert all(map(torch.equal, before, trainer.state.model.parameters()))
