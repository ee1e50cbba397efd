"""The training state: what is captured comes back, random draws included."""

import io
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launcher.checkpoint.state import TrainingState
from launcher.edges.generators import random_state, set_random_state
from launcher.edges.numbers import Sums
from launcher.edges.state import plain
from launcher.engine.run import model_layout
from launcher.errors import RunError, UsageError
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from tests.engine.helpers import ALONE, Regression, Trainer, assert_close, fresh, same

WORDS = ("MODEL.EMA_DECAY", 0.9, "TRAIN.PRECISION", "fp16", "OPTIM.NAME", "adamw")


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws() -> list[float]:
    ours = [torch.rand(()).item(), torch.randn(()).item(), random.random(), random.gauss(0, 1)]
    return [*ours, np.random.rand(), np.random.standard_normal()]


@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_draws_after_a_restore_are_equal(odd: bool) -> None:
    """Also where numpy and random hold back the second of a pair of normal numbers."""
    if odd:
        np.random.standard_normal()
        random.gauss(0, 1)
    saved = through_a_file(random_state())
    expected = [draws() for _ in range(3)]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    set_random_state(saved)
    assert [draws() for _ in range(3)] == expected


def captured(state: TrainingState) -> dict[str, Any]:
    whole = state.capture(ALONE)
    assert whole is not None
    return through_a_file(whole)


def test_a_restored_run_goes_on_as_the_one_it_was_taken_from() -> None:
    whole = Trainer(Regression(), *WORDS)
    whole.run(3)
    whole.state.progress.advance(24, 23, skipped=False)
    whole.state.scalers[""].update(new_scale=128.0)
    whole.state.recorded, whole.state.evaluated, whole.state.finished = 3, 2, "a callback"
    saved = captured(whole.state)

    resumed = Trainer(Regression(), *WORDS)
    resumed.one(0)  # something to be overwritten
    resumed.state.recorder.gather()
    resumed.state.restore(saved, ALONE)
    assert resumed.state.progress == whole.state.progress
    assert resumed.state.scalers[""].get_scale() == 128.0
    found = (resumed.state.recorded, resumed.state.evaluated, resumed.state.finished)
    assert found == (3, 2, "a callback")
    assert resumed.state.recorder.sums.state() == whole.state.recorder.sums.state()
    expected = draws()
    resumed.state.recorder.gather()
    resumed.state.restore(saved, ALONE)
    assert draws() == expected
    for trainer in (whole, resumed):
        trainer.one(3)
    assert whole.state.ema is not None and resumed.state.ema is not None
    assert same(whole.weights, resumed.weights)
    assert same(whole.state.ema.state_dict(), resumed.state.ema.state_dict())
    assert resumed.state.recorder.sums.state() == whole.state.recorder.sums.state()


def rank(of: int, world_size: int) -> Runtime:
    topology = Topology(of, of, world_size, world_size, launched_by="torchrun")
    return replace(ALONE, topology=topology)


def saved_by_two_ranks() -> dict[str, Any]:
    """What rank 0 of two saves: means of 2 (weight 1) on rank 0, and 5 (weight 2) on rank 1."""
    saved = captured(Trainer(Regression()).state)
    torch.manual_seed(0)
    ours, theirs = Sums(), Sums()
    ours.add(["loss"], [2.0], 1.0)
    theirs.add(["loss"], [5.0], 2.0)
    mine = {"random": random_state(), "means": theirs.state(), "threads": 5}
    saved["ranks"][0]["means"] = ours.state()
    saved["ranks"].append({**saved["ranks"][0], **mine})
    return saved


@pytest.mark.parametrize(
    ("of", "world_size", "means"),
    [
        (0, 2, [2.0, 1.0]),
        (1, 2, [5.0, 2.0]),
        (0, 1, [4.0, 3.0]),
        (0, 3, [4.0, 3.0]),
        (2, 3, None),
    ],
)
def test_means_of_the_interrupted_period_survive_any_number_of_ranks(
    of: int, world_size: int, means: list[float] | None
) -> None:
    state = fresh(Regression())
    state.restore(saved_by_two_ranks(), rank(of, world_size))
    mean, weight = means or (0.0, 0.0)
    assert state.recorder.sums.means() == ({"loss": mean} if means else {})
    assert not means or state.recorder.sums._sums["loss"].weight == weight


def test_a_rank_has_its_own_random_state_and_a_new_rank_keeps_its_seed() -> None:
    saved = saved_by_two_ranks()
    expected = {}
    for of in (0, 1):
        set_random_state(saved["ranks"][of]["random"])
        expected[of] = torch.rand(3)
    torch.manual_seed(77)
    expected[2] = torch.rand(3)
    for of in range(3):
        state = fresh(Regression())
        torch.manual_seed(77)
        state.restore(saved, rank(of, 3))
        assert torch.equal(torch.rand(3), expected[of])


def test_allowed_keys_of_the_optimiser_take_effect_and_its_averages_stay() -> None:
    words = ("OPTIM.NAME", "adamw", "OPTIM.LR", 0.1)
    whole = Trainer(Regression(), *words, "OPTIM.WEIGHT_DECAY", 0.3)
    whole.run(2)
    saved = captured(whole.state)
    resumed = Trainer(Regression(), *words, "OPTIM.LR", 0.002, "OPTIM.BETAS", "[0.5, 0.5]")
    resumed.state.restore(saved, ALONE, {"OPTIM.LR", "OPTIM.BETAS", "OPTIM.WEIGHT_DECAY"})
    (group,) = resumed.state.optimizers[""].param_groups
    assert group["betas"] == (0.5, 0.5) and group["weight_decay"] == 0
    resumed.step.schedules[""].apply(resumed.state.optimizers[""], 2)
    assert group["lr"] == 0.002
    theirs, ours = (t.state.optimizers[""].state_dict()["state"] for t in (whole, resumed))
    assert all(torch.equal(ours[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)


def test_another_optimiser_begins_afresh_and_another_precision_with_its_scaler() -> None:
    whole = Trainer(Regression())
    whole.run(2)
    words = ("OPTIM.NAME", "adamw", "TRAIN.PRECISION", "fp16")
    resumed = Trainer(Regression(), *words)
    changed = {"OPTIM.NAME", "TRAIN.PRECISION"}
    (told,) = resumed.state.restore(captured(whole.state), ALONE, changed, changed)
    assert "AdamW, not SGD" in told
    assert resumed.state.optimizers[""].state_dict()["state"] == {}
    assert_close(resumed.weights, whole.weights)
    resumed.one(2)


class Chooses(Regression):
    """Its own optimiser, of a class that its own code names."""

    kind: Any = torch.optim.SGD
    rate = 0.1

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind(model.parameters(), lr=self.rate)


class Counts(torch.optim.SGD):
    """Counts in its groups, as schedule-free optimisers do, and lowers its rate itself."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.defaults["k"] = 0
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["momentum"] = 0.5
        super().step()


def test_an_optimiser_of_another_class_is_refused_or_begins_afresh_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No key tells of it. With --allow still in its command line a restart keeps what it has."""
    whole = Trainer(Chooses())
    whole.run(2)
    saved, allow = captured(whole.state), {"CODE", "OPTIM.NAME"}
    monkeypatch.setattr(Chooses, "kind", torch.optim.Adam)
    resumed = Trainer(Chooses())
    with pytest.raises(UsageError, match=r"Adam, not SGD.*--allow OPTIM\.NAME"):
        resumed.state.restore(saved, ALONE, {"CODE"}, {"CODE"})
    assert resumed.state.restore(saved, ALONE, {"CODE"}, allow)
    resumed.run(2)
    again = Trainer(Chooses())
    assert again.state.restore(captured(resumed.state), ALONE, set(), allow) == []
    assert same(again.state.optimizers[""].state_dict(), resumed.state.optimizers[""].state_dict())


def test_what_training_has_changed_in_the_groups_stays_where_keys_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Chooses, "kind", Counts)
    whole = Trainer(Chooses())
    whole.run(3)
    monkeypatch.setattr(Chooses, "rate", 0.5)
    resumed = Trainer(Chooses())
    resumed.state.restore(captured(whole.state), ALONE, {"TASK.LR"}, {"TASK.LR"})
    (group,) = resumed.state.optimizers[""].param_groups
    assert group["k"] == 3 and group["lr"] == 0.5 and group["momentum"] == 0.5


def test_groups_that_change_while_training_are_refused_at_the_first_save() -> None:
    trainer = Trainer(Chooses())
    trainer.run(1)
    trainer.state.optimizers[""].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RunError, match=r"groups have changed.*make all groups in build_optimizer"):
        trainer.state.capture(ALONE)


def test_a_layout_tells_of_extra_state_that_is_no_tensor() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    layouts = {model_layout(model) for model in (nn.Linear(2, 2), Counting(2, 2), Counting(2, 3))}
    assert len(layouts) == 3


def test_the_average_has_the_models_extra_state() -> None:
    """A normaliser's, say: no average is made of it, and what it began with has learnt nothing."""

    class Learns(nn.Linear):
        seen = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += self.training
            return super().forward(x)

    class Normalises(Regression):
        def build_model(self) -> nn.Module:
            return Learns(4, 1)

    whole = Trainer(Normalises(), "MODEL.EMA_DECAY", 0.9)
    whole.run(3)
    saved = captured(whole.state)
    assert saved["ema"]["module._extra_state"] == saved["model"]["_extra_state"] != {"seen": 0}


def test_batch_norm_over_all_ranks_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"MODEL\.SYNC_BN works on CUDA only"):
        fresh(Regression(), "MODEL.SYNC_BN", True, runtime=rank(0, 2))
    fresh(Regression(), "MODEL.SYNC_BN", True)  # one process has all samples


class Counting(Regression):
    """Keeps a count and a queue of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.queue = 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": np.int64(self.seen), "queue": self.queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.queue = state["seen"], state["queue"]


def counted(*seen: int) -> dict[str, Any]:
    """What so many ranks save, of which each has its own."""
    task = Counting()
    saved = fresh(task).capture(ALONE)
    assert saved is not None and saved["ranks"][0]["task"]["seen"] == 0
    (first,) = saved["ranks"]
    saved["ranks"] = [{**first, "task": {"seen": n, "queue": torch.ones(2) * n}} for n in seen]
    return through_a_file(saved)


def test_a_tasks_own_state_comes_back_on_each_rank() -> None:
    for of in (0, 1):
        task = Counting()
        assert fresh(task).restore(counted(3, 4), rank(of, 2)) == []
        assert task.seen == 3 + of and torch.equal(task.queue, torch.ones(2) * (3 + of))
    through_a_file(plain(fresh(task).capture(ALONE)))


def test_a_tasks_own_state_is_left_out_on_another_number_of_ranks_only_if_allowed() -> None:
    for of, world_size in ((0, 1), (1, 3)):
        task = Counting()
        with pytest.raises(UsageError, match=r"kept on 2 ranks, this run has .*TASK_STATE"):
            fresh(task).restore(counted(3, 4), rank(of, world_size))
        (told,) = fresh(task).restore(counted(3, 4), rank(of, world_size), (), {"TASK_STATE"})
        assert told.startswith("the checkpoint has the state that Counting kept on 2 ranks")
        assert task.seen == 0
    # Nothing is lost where there was none; nor silently where the task takes none any more.
    nothing = [{**r, "task": None} for r in counted(3, 4)["ranks"]]
    assert fresh(Counting()).restore({**counted(3, 4), "ranks": nothing}, rank(0, 1)) == []
    with pytest.raises(UsageError, match=r"it keeps none now.*--allow TASK_STATE"):
        fresh(Regression()).restore(counted(3), ALONE)
    assert fresh(Regression()).restore(counted(3), ALONE, (), {"TASK_STATE"})


def test_a_checkpoint_from_before_there_was_such_state_is_loaded() -> None:
    saved, task = counted(3), Counting()
    for name in ("task", "reasons"):
        del saved["ranks"][0][name]
    assert fresh(task).restore(saved, ALONE) == [] and task.seen == 0


@pytest.mark.parametrize("has", ["state_dict", "load_state_dict"])
def test_half_a_state_is_refused_with_what_it_lacks(has: str) -> None:
    half = type("Half", (Regression,), {has: lambda self, *_: {}})
    lacks = "state_dict" if has == "load_state_dict" else "load_state_dict"
    with pytest.raises(UsageError, match=rf"Half has {has} but no {lacks}: "):
        fresh(half()).of_rank()
    # On the class, that is: what a task holds, as a module does, is its own.
    task = Regression()
    task.state_dict = dict  # type: ignore[attr-defined]
    assert fresh(task).of_rank()["task"] is None


def test_errors_of_a_tasks_state_are_told_with_its_method() -> None:
    class Fails(Counting):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("gone")

    with pytest.raises(KeyError) as error:
        fresh(Fails()).restore(counted(3), ALONE)
    assert error.value.__notes__ == ["in Fails.load_state_dict"]  # type: ignore[attr-defined]
    saving = type("Saving", (Fails,), {"state_dict": lambda self: {}["gone"]})
    with pytest.raises(KeyError) as error:
        fresh(saving()).of_rank()
    assert error.value.__notes__ == ["in Saving.state_dict"]  # type: ignore[attr-defined]
