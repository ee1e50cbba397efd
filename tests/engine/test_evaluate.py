"""Evaluation: every sample once, in the data set's order, at any number of ranks."""

import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.data.plan import Plan
from launcher.errors import RunError
from launcher.guard.failure import describe
from launcher.runtime.progress import Progress
from launcher.telemetry.media import Media
from launcher.telemetry.recorder import Recorder
from tests.engine.helpers import ALONE, config, evaluation, recording, same, unasked

N = 10
X = torch.arange(N, dtype=torch.float32) ** 2 / 7


class Table:
    """Answers with a table of outputs, a row a sample."""

    def __init__(self, **columns: Any) -> None:
        self.columns, self.recorder = columns, recording()

    def eval_step(self, model: nn.Module, batch: slice) -> Any:
        assert not model.training and not torch.is_grad_enabled()
        return {key: value[batch] for key, value in self.columns.items()}


class Summed(Table):
    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.outputs = outputs
        return {"largest": outputs["loss"].max()}


class Always(Table):
    def eval_step(self, model: nn.Module, batch: slice) -> Any:
        return self.columns["answer"]


def run(
    task: Any, batch_size: int = 4, model: nn.Module | None = None, guard: Any = None
) -> dict[str, float] | None:
    plan = Plan(N, batch_size)
    batches = [slice(*plan.batch(k)) for k in range(plan.steps_per_epoch)]
    return evaluation(task, batches, plan, guard=guard)(model or nn.Linear(1, 1), ["val"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 99])
def test_every_sample_counts_once_and_in_order_at_any_batch_size(batch_size: int) -> None:
    """A mean of the batches' means would be wrong at 3 and 4, whose last batch is smaller."""
    columns = {"loss": X, "right": X > 3, "label": torch.arange(N), "rows": torch.randn(N, 3)}
    task = Summed(**columns)
    assert run(task, batch_size) == {
        "val/loss": pytest.approx(X.double().mean().item(), rel=1e-15),
        "val/right": (X > 3).double().mean().item(),
        "val/largest": X.max().item(),
    }
    assert same(task.outputs, columns)


def test_weights_are_those_of_samples() -> None:
    weight = torch.arange(N)  # one sample has weight 0
    metrics = run(Table(loss=X, right=X > 3, weight=weight))
    assert metrics == {
        "val/loss": pytest.approx((X * weight).sum().item() / 45, rel=1e-6),
        "val/right": pytest.approx(((X > 3) * weight).sum().item() / 45, rel=1e-6),
    }


def test_float16_values_are_averaged_in_double_precision() -> None:
    x = torch.full((N,), 60_000.0, dtype=torch.float16)  # their sum is beyond float16
    assert run(Table(loss=x))["val/loss"] == x[0].item()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (torch.zeros(4), "must return a dict of tensors, not Tensor"),
        ({}, "must return a dict of tensors"),
        ({"loss": torch.tensor(1.0)}, r"\{'loss': \(\)\}.*reduction='none'"),
        ({"loss": 1.0}, "{'loss': 'float'}.*reduction='none'"),
        ({"loss": torch.zeros(4), "x": torch.zeros(3)}, r"\(4,\).*\(3,\).*reduction='none'"),
        ({"loss": torch.zeros(1)}, r"\(samples 0 to 4\) .* shape \(5, \.\.\.\), .*\(1,\)"),
        # (B,) times (B, 1) is (B, B): a wrong number that looks like one.
        ({"loss": torch.zeros(5), "weight": torch.ones(5, 1)}, r"'weight' of .*\('B', 1\)"),
    ],
)
def test_wrong_shapes_are_told_with_the_remedy(answer: Any, told: str) -> None:
    with pytest.raises(RunError, match=rf"Always\.eval_step .*{told}"):
        run(Always(answer=answer), batch_size=5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_evaluates_without_gradients_and_is_put_back(training: bool) -> None:
    model = nn.Linear(1, 1).train(training)
    run(Table(loss=X), model=model)
    assert model.training is training and torch.is_grad_enabled()


class Recording(Table):
    """Shows and counts something in each batch, and is asked to stop in the second if told to."""

    def __init__(self, stops: bool) -> None:
        super().__init__(loss=X)
        self.stops, self.seen, self.shown = stops, 0, list[Media]()
        self.guard = unasked()
        writer: Any = SimpleNamespace(show=self.shown.append, is_open=True)
        self.recorder = Recorder(ALONE, Progress(), writer)

    def eval_step(self, model: nn.Module, batch: slice) -> Any:
        self.seen += 1
        self.recorder.text("note", "x")
        self.recorder.scalar("seen", self.seen, weight=self.seen)
        if self.stops and self.seen == 2:
            self.guard.stop = "asked to"
        return super().eval_step(model, batch)

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.recorder.text("end", "x")
        self.recorder.scalar("whole", len(outputs["loss"]))
        return {}


def test_what_is_recorded_meanwhile_is_the_evaluations() -> None:
    task = Recording(stops=False)
    metrics = run(task)
    assert metrics is not None
    assert (metrics["val/seen"], metrics["val/whole"]) == ((1 + 4 + 9) / 6, N)
    assert [name for media in task.shown for name in media.names] == ["val/note", "val/end"]
    assert task.recorder.split == "train" and task.recorder.sums.state() == {}


def test_an_evaluation_that_is_given_up_shows_nothing() -> None:
    """It is done once more after the resume, at the same step, and shows it then."""
    task = Recording(stops=True)
    assert run(task, guard=task.guard) is None
    assert task.seen == 2 and task.shown == []


def test_an_error_in_eval_step_says_where_and_at_which_samples() -> None:
    class Mistaken(Table):
        def eval_step(self, model: nn.Module, batch: slice) -> Any:
            return {"loss": {}["boom"]} if batch.start else super().eval_step(model, batch)

    with pytest.raises(KeyError) as caught:
        run(Mistaken(loss=X))
    told = describe(caught.value, config(), 1)
    assert told == "KeyError: 'boom' (in Mistaken.eval_step (samples 4 to 7))"


class Lists(Table):
    """Outputs of any kind beside numbers, folded batch by batch if told to."""

    def summarize(self, outputs: Any) -> dict[str, Any]:
        self.outputs = outputs
        return {"longest": max(map(len, outputs["words"]))}


def test_lists_reach_summarize_in_the_data_sets_order() -> None:
    words = [f"{i}" * (i % 4) for i in range(N)]
    things: list[Any] = [{"box": torch.full((i, 4), float(i)), "at": (i, None)} for i in range(N)]
    task = Lists(loss=X, words=words, things=things)
    metrics = run(task, 3)
    assert metrics is not None and metrics["val/longest"] == 3
    assert set(metrics) == {"val/loss", "val/longest"}
    assert same(task.outputs, {"loss": X, "words": words, "things": things})


class Folds(Lists):
    def start(self) -> list[str]:
        return []

    def merge(self, folded: list[str], outputs: dict[str, Any]) -> list[str]:
        assert len(outputs["words"]) <= 3 and isinstance(outputs["loss"], torch.Tensor)
        return folded + outputs["words"]

    def summarize(self, outputs: Any) -> dict[str, Any]:
        self.outputs = outputs
        return {}


def test_a_fold_is_given_batch_after_batch_and_its_end_to_summarize() -> None:
    task = Folds(loss=X, words=[str(i) for i in range(N)])
    assert run(task, 3) == {"val/loss": pytest.approx(X.double().mean().item(), rel=1e-15)}
    assert task.outputs == [str(i) for i in range(N)]


def test_a_merge_that_forgets_to_return_is_told() -> None:
    class Forgets(Folds):
        def merge(self, folded: Any, outputs: Any) -> None:  # type: ignore[override]
            folded += outputs["words"]

    with pytest.raises(
        RunError, match=r"Forgets\.merge returned None; it must return what is folded"
    ):
        run(Forgets(loss=X, words=["w"] * N))


def test_outputs_stay_where_nobody_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(type(ALONE), "gather", lambda self, value: sent.append(value) or [value])
    run(Table(loss=X, images=torch.zeros(N, 1000)))
    assert sent[0][0] == [] and len(pickle.dumps(sent[0])) < 500
    run(Summed(loss=X, images=torch.zeros(N, 1000)))
    assert all(set(output) == {"loss", "images"} for _, output in sent[1][0])


class Carries(Table):
    """A running sum along each share; what a batch is given is what the one before it returned."""

    eval_shares = 2

    def eval_step(self, model: nn.Module, batch: slice, carried: Any = None) -> Any:
        running = X[batch].cumsum(0) + (0.0 if carried is None else carried)
        return {"loss": running, "carried": running[-1]}


def test_a_state_is_carried_from_batch_to_batch_of_a_share() -> None:
    metrics = run(Carries(), 2)  # 5 batches: shares of 3 and 2
    expected = torch.cat([X[:6].cumsum(0), X[6:].cumsum(0)]).double().mean().item()
    assert metrics == {"val/loss": pytest.approx(expected, rel=1e-6)}


def test_a_weight_of_zero_throughout_gives_no_number() -> None:
    metrics = run(Table(loss=X, weight=torch.zeros(N)))
    assert metrics is not None and math.isnan(metrics["val/loss"])
    part = torch.zeros(N)
    part[-1] = 2.0
    assert run(Table(loss=X, weight=part)) == {"val/loss": X[-1].item()}


def test_what_is_shown_is_shown_once_in_eval_mode_after_the_metrics() -> None:
    class Shows(Table):
        calls = 0

        def show(self, model: nn.Module) -> None:
            assert not model.training and not torch.is_grad_enabled()
            self.calls += 1
            self.recorder.scalar("shown", 1.0)
            self.drawn = torch.rand(()).item()

    task, drawn = Shows(loss=X), []
    batches, plan = [slice(0, N)], Plan(N, N)
    evaluate = evaluation(task, batches, plan)
    for _ in range(2):
        metrics = evaluate(nn.Linear(1, 1), ["val", "test"], show=True)
        assert metrics is not None and set(metrics) == {"val/loss", "val/shown", "test/loss"}
        drawn.append(task.drawn)
    assert task.calls == 2 and drawn[0] == drawn[1]
    evaluate(nn.Linear(1, 1), ["val"], "_raw")
    assert task.calls == 2


def test_batches_draw_different_numbers_and_the_same_ones_each_time() -> None:
    class Draws(Table):
        def eval_step(self, model: nn.Module, batch: slice) -> Any:
            output = super().eval_step(model, batch)
            self.drawn.append(torch.rand(()).item())
            return output

    task, drawn = Draws(loss=X), []
    for _ in range(2):
        task.drawn = []
        run(task)
        drawn.append(task.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
