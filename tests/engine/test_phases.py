"""Several optimisers in one step: each phase is what plain torch does for its own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launcher.callbacks.throughput import Throughput
from launcher.data.plan import Plan
from launcher.errors import RunError, UsageError
from tests.engine.helpers import LENGTH, Regression, Trainer, assert_close, drawn, fresh

RATES = {"critic": 0.3, "generator": 0.05}
CLIP = 0.2


class Game(Regression):
    """A critic that tells y from a guess of it, and who guesses, in turns; nothing is drawn."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict(
            {
                "generator": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
                "critic": nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)),
            }
        )

    def build_optimizer(self, model: Any) -> Any:
        return {
            phase: torch.optim.SGD(model[phase].parameters(), rate, momentum=0.9)
            for phase, rate in RATES.items()
        }

    def train_step(self, model: Any, batch: Any, phase: str = "") -> dict[str, Any]:
        x, y, w = batch
        guess = model["generator"](x)
        # Not detached for the critic's turn: the generator's gradients are off.
        false, true = (model["critic"](torch.cat([x, z], 1)).squeeze(1) for z in (guess, y))
        log = nn.functional.logsigmoid
        losses = -(log(true) + log(-false)) if phase == "critic" else -log(false)
        loss = (losses * w).sum() / w.sum().clamp_min(1e-9)
        more = {"weight": w.sum()} if self.weighted else {}
        return {"loss": loss, f"of_{phase}": loss.detach() + 1, "both": loss.detach(), **more}


class ManyCritics(Game):
    def phases(self, step: int) -> Any:
        return ["generator", "critic"] if step % 3 == 2 else "critic"


class At(Trainer):
    """Each step is told its number."""

    def one(self, step: int, asked: frozenset[str] = frozenset()) -> Any:
        self.state.progress.step = step
        return super().one(step, asked)


def by_hand(task: Game, batch_size: int, steps: int, clip: float = 0.0) -> list[torch.Tensor]:
    model: Any = task.build_model()
    optimizers = task.build_optimizer(model)
    plan = Plan(LENGTH, batch_size)
    for step in range(steps):
        epoch, k = divmod(step, plan.steps_per_epoch)
        batch = drawn(task, epoch, *plan.batch(k))
        running = task.phases(step) if hasattr(task, "phases") else list(optimizers)
        for phase in optimizers:
            if phase not in running:
                continue
            model.zero_grad()
            task.train_step(model, batch, phase)["loss"].backward()
            if clip:
                nn.utils.clip_grad_norm_(model[phase].parameters(), clip)
            optimizers[phase].step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", [Game, ManyCritics])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch", "micro"), [(8, 0), (8, 3), (7, 1)])
def test_phases_are_those_of_plain_torch(
    kind: type[Game], weighted: bool, batch: int, micro: int
) -> None:
    trainer = At(kind(weighted), batch=batch, micro=micro)
    trainer.run(7)
    assert_close(trainer.weights, by_hand(kind(weighted), batch, 7))
    assert all(p.requires_grad and p.grad is None for p in trainer.state.model.parameters())


def test_each_phase_is_clipped_by_its_own_norm() -> None:
    trainer = Trainer(Game(), "TRAIN.GRAD_CLIP", CLIP)
    trainer.run(4)
    assert_close(trainer.weights, by_hand(Game(), 8, 4, CLIP))


def test_each_phase_has_a_scaler_of_its_own() -> None:
    trainer = Trainer(Game(), "TRAIN.PRECISION", "fp16")
    trainer.one(0)
    critic, generator = (phase.scaler for phase in trainer.step.phases)
    critic.update(new_scale=2.0**40)  # whose gradients overflow
    generator.update(new_scale=2.0**4)
    before = trainer.weights
    skipped, _ = trainer.one(1)
    assert not skipped  # the generator's update counts
    assert (critic.get_scale(), generator.get_scale()) == (2.0**39, 2.0**4)
    pairs = zip(trainer.state.model.named_parameters(), before, strict=True)
    moved = {name for (name, p), old in pairs if not torch.equal(p, old)}
    assert moved and all(name.startswith("generator") for name in moved)


def test_each_phase_has_its_own_rates_under_the_schedule() -> None:
    trainer = Trainer(Game(), "OPTIM.SCHEDULE", "linear", "TRAIN.DURATION", "4step")
    trainer.state.progress.step = 1
    trainer.one(1)
    groups = [optimizer.param_groups[0] for optimizer in trainer.state.optimizers.values()]
    assert [group["lr"] for group in groups] == pytest.approx([0.3 * 0.75, 0.05 * 0.75])


def test_names_that_two_phases_return_carry_the_phase() -> None:
    trainer = At(ManyCritics())
    trainer.one(0)  # the critic alone
    first = trainer.recorded()
    assert set(first) == {
        *("train/loss/critic", "train/grad_norm/critic", "train/of_critic", "train/both")
    }
    trainer.one(2)
    second = trainer.recorded()
    assert {"train/both/critic", "train/both/generator", "train/of_generator"} <= set(second)
    assert second["train/of_generator"] == pytest.approx(second["train/loss/generator"] + 1)
    trainer.one(3)
    assert "train/both/critic" in trainer.recorded()  # from then on


def test_what_is_recorded_beside_is_the_phases_too() -> None:
    class Notes(Game):
        def train_step(self, model: Any, batch: Any, phase: str = "") -> dict[str, Any]:
            self.recorder.scalar("noted", {"critic": 1.0, "generator": 5.0}[phase])
            return super().train_step(model, batch, phase)

    trainer = Trainer(Notes())
    trainer.run(2)
    trainer.state.recorder.scalar("noted", 9.0)  # of a hook, say
    record = trainer.recorded()
    assert [record[f"train/noted{of}"] for of in ("/critic", "/generator", "")] == [1, 5, 9]


def test_the_names_go_on_over_a_resume() -> None:
    whole = At(ManyCritics())
    whole.run(3)
    whole.recorded()
    saved = whole.state.shared() | {"ranks": [{**whole.state.of_rank(), "buffers": {}}]}
    resumed = fresh(ManyCritics(), "TRAIN.BATCH_SIZE", 8)
    resumed.restore(saved, whole.step.runtime)
    assert resumed.recorder.phases == whole.state.recorder.phases
    for phase, optimizer in resumed.optimizers.items():
        theirs = whole.state.optimizers[phase].state_dict()["state"]
        ours = optimizer.state_dict()["state"]
        for index, state in theirs.items():
            assert torch.equal(ours[index]["momentum_buffer"], state["momentum_buffer"])


class Shares(Game):
    def build_optimizer(self, model: Any) -> Any:
        made = super().build_optimizer(model)
        made["critic"] = torch.optim.SGD(model.parameters(), 0.1)
        return made


class NoWord(Game):
    def build_optimizer(self, model: Any) -> Any:
        return {3: torch.optim.SGD(model.parameters(), 0.1)}


class Nothing(Game):
    def build_optimizer(self, model: Any) -> Any:
        return {}


class OnePhase(Game):
    def train_step(self, model: Any, batch: Any) -> Any:  # type: ignore[override]
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Shares, r"generator\.0\.weight is trained by critic and generator"),
        (NoWord, "by the name of their phase, a word each; it returned a dict of 3"),
        (Nothing, "it returned a dict of nothing"),
        (OnePhase, r"OnePhase\.train_step .*\(model, batch, phase\)"),
    ],
)
def test_phases_that_cannot_be_taken_are_refused_before_anything(
    kind: type[Game], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        Trainer(kind())


@pytest.mark.parametrize("returned", [[], "painter", ["critic", "painter"], 3])
def test_a_step_has_at_least_one_phase_and_only_those_there_are(returned: Any) -> None:
    class Wrong(Game):
        def phases(self, step: int) -> Any:
            return returned

    with pytest.raises((RunError, TypeError)) as caught:
        Trainer(Wrong()).one(0)
    assert "Wrong.phases(0)" in f"{caught.value} {getattr(caught.value, '__notes__', '')}"


def test_weights_of_a_phase_that_a_step_does_not_use_are_named_alone() -> None:
    class Spare(Game):
        def build_model(self) -> nn.Module:
            model: Any = super().build_model()
            model["critic"].spare = nn.Parameter(torch.ones(1))
            return model

    trainer = Trainer(Spare())
    trainer.step.may_miss = False  # as on several ranks
    with pytest.raises(RunError, match=r"does not use critic\.spare, so"):
        trainer.one(0)


def test_gradients_that_the_task_switches_in_a_phase_are_told() -> None:
    class Switches(Game):
        def train_step(self, model: Any, batch: Any, phase: str = "") -> Any:
            model["critic"].requires_grad_(True)
            return super().train_step(model, batch, phase)

    with pytest.raises(RunError, match=r"requires_grad of critic\.0\.weight"):
        Trainer(Switches()).one(0)


def test_the_flops_of_a_step_are_those_of_all_its_phases() -> None:
    trainer = Trainer(Game(), "LOG.COUNT_FLOPS", True)
    trainer.one(0)
    trainer.state.callbacks.call("on_step")
    (throughput,) = (c for c in trainer.state.callbacks.all if isinstance(c, Throughput))
    with FlopCounterMode(display=False) as counter:
        by_hand(Game(), 8, 1)
    # The generator's own gradients in the critic's phase, which plain torch computes for nothing.
    assert 0 < throughput.per_sample * 8 <= counter.get_total_flops()
    with FlopCounterMode(display=False) as first:
        model: Any = Game().build_model()
        model["generator"].requires_grad_(False)
        Game().train_step(model, drawn(Game(), 0, 0, 8), "critic")["loss"].backward()
    assert throughput.per_sample * 8 > first.get_total_flops()
