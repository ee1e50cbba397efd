"""Groups of weights by pattern, by depth and without decay, against groups made by hand."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import nn

from launcher.edges.optimizer import rates
from launcher.errors import UsageError
from launcher.optim.layers import model_layers
from launcher.optim.optimizers import build_optimizers, from_config
from tests.checkpoint.test_state import captured
from tests.engine.helpers import ALONE, Trainer, assert_close, config, same
from tests.optim.hand import Mixed, by_hand

SGD: Any = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
WORDS = ("OPTIM.LR=0.1", "OPTIM.WEIGHT_DECAY=0.01")


def group(parameters: Any, **own: Any) -> dict[str, Any]:
    return {"params": list(parameters), **own}


def described(*words: object, model: Any = None, task: Any = None) -> dict[str, dict[str, Any]]:
    """What each weight is given, by its name."""
    model = model if model is not None else Mixed().build_model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizers(config(*WORDS, *words), task or object(), model)[""]
    return {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    ("entries", "make"),
    [
        (
            ["body LR_SCALE=0.1"],
            lambda m: [
                group(m["body"].parameters(), lr=0.01),
                group([m.gain, *m["table"].parameters(), *m["head"].parameters()]),
            ],
        ),
        (
            ["body* LR=0.05 WEIGHT_DECAY=0", "body.3 LR=0.02 MOMENTUM=0.5", "gain LR_SCALE=2"],
            lambda m: [
                group([*m["body"][0].parameters(), *m["body"][1].parameters()], lr=0.05)
                | {"weight_decay": 0},
                group(m["body"][3].parameters(), lr=0.02, weight_decay=0, momentum=0.5),
                group([m.gain], lr=0.2),
                group([*m["table"].parameters(), *m["head"].parameters()]),
            ],
        ),
    ],
)
def test_weights_train_as_in_groups_made_by_hand(entries: list[str], make: Any) -> None:
    trainer = Trainer(Mixed(), *WORDS, "OPTIM.GROUPS", str(entries))
    trainer.run(5)
    expected = by_hand(Mixed(), lambda m: [torch.optim.SGD(make(m), **SGD)], 5)
    assert_close(trainer.weights, expected)


def test_norms_and_biases_go_without_decay_where_asked_and_not_before() -> None:
    assert {g["weight_decay"] for g in described().values()} == {0.01}
    found = described("OPTIM.SKIP_NORM_DECAY=true")
    kept = {name for name, g in found.items() if g["weight_decay"]}
    assert kept == {"table.weight", "body.0.weight", "body.3.weight", "head.weight"}
    # A pattern for the rate leaves it at that; one for the decay says otherwise.
    entries = "['body LR_SCALE=0.5', 'head WEIGHT_DECAY=0.3']"
    found = described("OPTIM.SKIP_NORM_DECAY=true", f"OPTIM.GROUPS={entries}")
    assert found["body.1.bias"]["weight_decay"] == 0 and found["body.1.bias"]["lr"] == 0.05
    assert found["head.bias"]["weight_decay"] == 0.3


def test_a_norm_of_two_dimensions_is_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([2, 4]), nn.BatchNorm1d(2))
    found = described("OPTIM.SKIP_NORM_DECAY=true", model=model)
    assert [name for name, g in found.items() if g["weight_decay"]] == ["0.weight"]


def test_without_rules_there_is_one_group_as_before() -> None:
    (only,) = {id(g): g for g in described().values()}.values()
    assert "name" not in only and only["lr"] == 0.1


def test_the_first_group_has_the_rate_of_the_config_and_all_have_names() -> None:
    words = ("OPTIM.GROUPS=['gain LR_SCALE=0.5', 'body LR=0.3']", "OPTIM.SCHEDULE=linear")
    trainer = Trainer(Mixed(), *WORDS, *words, "TRAIN.DURATION=4step")
    trainer.state.progress.step = 2
    trainer.one(2)
    found = rates(trainer.state.optimizers)
    assert found == pytest.approx(
        {"train/lr": 0.05, "train/lr/rest": 0.05, "train/lr/gain": 0.025, "train/lr/body": 0.15}
    )


def test_every_rate_grows_with_the_global_batch() -> None:
    words = ("OPTIM.LR_SCALING=linear", "OPTIM.LR_BATCH=32", "TRAIN.BATCH_SIZE=128")
    found = described(*words, "OPTIM.GROUPS=['head LR=0.2', 'gain LR_SCALE=0.5']")
    assert (found["body.0.bias"]["lr"], found["head.bias"]["lr"]) == (0.4, 0.8)
    assert found["gain"]["lr"] == 0.2


def test_patterns_that_fit_nothing_or_only_what_is_frozen() -> None:
    with pytest.raises(UsageError, match=r"OPTIM\.GROUPS: 'bodi' fits no weight.*near it are body"):
        described("OPTIM.GROUPS=['bodi LR=1']")
    model: Any = Mixed().build_model()
    model["body"].requires_grad_(False)
    with pytest.raises(UsageError, match=r"'body\.\* LR=1': all that 'body\.\*' fits is frozen"):
        described("OPTIM.GROUPS=['body.* LR=1']", model=model)
    assert "body.0.bias" not in described("OPTIM.GROUPS=['*.bias LR=1']", model=model)


def test_a_tied_weight_has_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert described("OPTIM.GROUPS=['1.weight LR=2']", model=model)["0.weight"]["lr"] == 2


class Scaled(Mixed):
    """timm's convention, in groups of its own."""

    def build_optimizer(self, model: Any) -> Any:
        body = list(model["body"].parameters())
        rest = [model.gain, *model["table"].parameters(), *model["head"].parameters()]
        return torch.optim.SGD([group(rest), group(body, lr_scale=0.25)], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_lr_scale_of_a_tasks_own_counts(schedule: str) -> None:
    words = ("TRAIN.DURATION=6step", f"OPTIM.SCHEDULE={schedule}")
    trainer = Trainer(Scaled(), *words)
    for step in range(6):
        trainer.state.progress.step = step
        trainer.one(step)

    def make(m: Any) -> list[Any]:
        rest = [m.gain, *m["table"].parameters(), *m["head"].parameters()]
        groups = [group(rest), group(m["body"].parameters(), lr=0.025)]
        return [torch.optim.SGD(groups, lr=0.1, momentum=0.9)]

    def before(optimizers: list[Any], step: int) -> None:
        factor = 1.0
        if schedule == "cosine":
            factor = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6))).item()
        for g, lr in zip(optimizers[0].param_groups, (0.1, 0.025), strict=True):
            g["lr"] = lr * factor

    assert_close(trainer.weights, by_hand(Scaled(), make, 6, before))


def test_an_lr_scale_that_is_another_at_a_resume_takes_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Trainer(Scaled())
    whole.run(2)

    def other(self: Any, model: Any) -> Any:
        optimizer = Scaled.build_optimizer(self, model)
        optimizer.param_groups[1]["lr_scale"] = 0.5
        return optimizer

    resumed = Trainer(type("Scaled", (Scaled,), {"build_optimizer": other})())
    resumed.state.restore(captured(whole.state), ALONE, {"CODE"}, {"CODE"})
    resumed.one(2)
    assert [g["lr"] for g in resumed.state.optimizers[""].param_groups] == [0.1, 0.05]


# --- depth


class Block(nn.Module):
    """With a stack inside that is no stack of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))


class Tower(nn.Module):
    """As vision transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.patches = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)


class Stages(nn.Module):
    """As residual networks are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.stage1, self.stage2 = (nn.Sequential(Block(), Block()) for _ in range(2))
        self.fc = nn.Linear(4, 2)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


def firsts(model: nn.Module) -> list[str]:
    """The name of the first weight of each layer."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = model_layers(model)
    assert sorted(names) == sorted(id(p) for layer in layers for p in layer)  # each once
    return [names[id(layer[0])] for layer in layers]


BLOCKS = [f"blocks.{k}.norm.weight" for k in range(3)]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Tower(), ["token", *BLOCKS]),
        (
            nn.ModuleDict({"backbone": Tower(), "head": nn.Linear(4, 2)}),
            ["backbone.token", *(f"backbone.{b}" for b in BLOCKS), "head.weight"],
        ),
        (
            nn.Sequential(Stages()),
            ["0.stem.weight"]
            + [f"0.stage{k}.{i}.norm.weight" for k in (1, 2) for i in (0, 1)]
            + ["0.fc.weight"],
        ),
        (nn.Sequential(Stages(), nn.ReLU(), nn.Linear(2, 2)), None),
        (
            nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
                nn.Sequential(Block(), Block()),
                nn.Sequential(Block(), Block()),
            ),
            ["0.0.weight", *(f"{k}.{i}.norm.weight" for k in (1, 2) for i in (0, 1))],
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)), None),
        (Three(), ["a.weight", "b.weight", "c.weight"]),
        (nn.Sequential(Three()), ["0.a.weight", "0.b.weight", "0.c.weight"]),
        (nn.Linear(2, 2), ["weight"]),
    ],
)
def test_layers_of_nested_modules(model: nn.Module, layers: list[str] | None) -> None:
    if layers is None:
        found = firsts(model)
        assert found[-1] in ("2.weight", "3.weight") and found[0].split(".")[0] == "0"
        assert len(found) == (7 if isinstance(model[0], Stages) else 2)  # type: ignore[index]
    else:
        assert firsts(model) == layers


def test_the_rate_falls_from_the_head_down_also_where_a_part_is_frozen() -> None:
    model: Any = nn.ModuleDict({"backbone": Tower(), "head": nn.Linear(4, 2)})
    model["backbone"].patches.requires_grad_(False)
    model["backbone"].blocks[1].requires_grad_(False)
    words = ("OPTIM.LAYER_DECAY=0.5", "OPTIM.GROUPS=['*.norm LR_SCALE=3']")
    found = {name: g["lr"] for name, g in described(*words, model=model).items()}
    expected = {
        **{"head.weight": 0.1, "backbone.blocks.2.mlp.0.bias": 0.05},
        **{"backbone.blocks.0.experts.0.0.weight": 0.0125, "backbone.token": 0.00625},
        **{"backbone.blocks.0.norm.bias": 0.0375, "backbone.norm.weight": 0.15},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


class Names:
    def __init__(self, *layers: Any) -> None:
        self.layers = layers

    def decay_layers(self, model: nn.Module) -> Any:
        return self.layers


def test_a_task_names_its_layers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "launcher")
    task = Names(["table", "gain"], "body.0", ["body.1", "body.3"], "head")
    found = described("OPTIM.LAYER_DECAY=0.1", task=task)
    names = ("gain", "table.weight", "body.0.weight", "body.3.bias", "head.weight")
    scales = [found[name]["lr"] / 0.1 for name in names]
    assert scales == pytest.approx([1e-3, 1e-3, 1e-2, 1e-1, 1])
    assert "layer 1 has 0.01 of the rate: body.0.weight, body.0.bias" in caplog.text


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["table", "body"], r"Names\.decay_layers: gain, head\.weight, head\.bias is in no layer"),
        (["table", "body", ["body.3", "head", "gain"]], r"body\.3\.\w+.* is in two layers"),
        (["tables", "*"], r"Names\.decay_layers: 'tables' fits no weight"),
        (["*"], r"has no layers that could be told apart"),
    ],
)
def test_layers_that_cannot_be(layers: list[Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        described("OPTIM.LAYER_DECAY=0.1", task=Names(*layers))


# --- over a resume


GROUPED = (*WORDS, "OPTIM.SKIP_NORM_DECAY=true", "OPTIM.GROUPS=['head LR_SCALE=3']")


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "rmsprop"])
def test_groups_survive_a_resume_exactly(name: str) -> None:
    words = (*GROUPED, f"OPTIM.NAME={name}", "OPTIM.LAYER_DECAY=0.7", "OPTIM.SCHEDULE=cosine")
    words += ("OPTIM.WEIGHT_DECAY_SCHEDULE=linear", "OPTIM.WEIGHT_DECAY_FACTOR=5")
    whole, resumed = (Trainer(Mixed(), *words, "TRAIN.DURATION=9step") for _ in range(2))
    for step in range(6):
        if step == 3:
            assert resumed.state.restore(captured(whole.state), ALONE) == []
        for trainer in (whole, *[resumed] * (step > 2)):
            trainer.state.progress.step = step
            trainer.one(step)
    assert same(whole.weights, resumed.weights)
    ours, theirs = (t.state.optimizers[""].state_dict() for t in (resumed, whole))
    assert same(ours, theirs)


def test_a_weight_keeps_its_own_state_where_the_groups_are_others_now() -> None:
    """Of groups that are as large as before, too: torch alone goes by the order of the weights."""
    for other in ("['body.0 LR_SCALE=3']", "['head LR_SCALE=3', 'gain LR=1']"):
        whole = Trainer(Mixed(), *WORDS, "OPTIM.GROUPS=['body.3 LR_SCALE=3']")
        whole.run(3)
        resumed = Trainer(Mixed(), *WORDS, f"OPTIM.GROUPS={other}")
        allow = {"OPTIM.GROUPS"}
        (told,) = resumed.state.restore(captured(whole.state), ALONE, allow, allow)
        assert "groups are others now" in told
        for (_, theirs), (name, ours) in zip(
            whole.state.model.named_parameters(),
            resumed.state.model.named_parameters(),
            strict=True,
        ):
            before, now = (
                t.state.optimizers[""].state[p] for t, p in ((whole, theirs), (resumed, ours))
            )
            assert same(now["momentum_buffer"], before["momentum_buffer"]), name
        expected = described(f"OPTIM.GROUPS={other}")
        resumed.one(3)
        names = {id(p): n for n, p in resumed.state.model.named_parameters()}
        for g in resumed.state.optimizers[""].param_groups:
            assert {expected[names[id(p)]]["lr"] for p in g["params"]} == {g["lr"]}


def test_other_weights_of_the_same_number_are_another_optimiser() -> None:
    whole = Trainer(Mixed(), "MODEL.FREEZE=[body.0.bias]")
    whole.run(1)
    resumed = Trainer(Mixed(), "MODEL.FREEZE=[body.3.bias]")
    told = r"of other weights: body\.0\.bias, body\.3\.bias.*--allow OPTIM\.NAME"
    with pytest.raises(UsageError, match=told):
        resumed.state.restore(captured(whole.state), ALONE, {"MODEL.FREEZE"}, {"MODEL.FREEZE"})


def test_values_of_a_group_that_are_allowed_take_effect() -> None:
    whole = Trainer(Mixed(), *GROUPED, "OPTIM.LAYER_DECAY=0.7")
    whole.run(2)
    words = (*WORDS, "OPTIM.SKIP_NORM_DECAY=true", "OPTIM.GROUPS=['head LR_SCALE=2']")
    resumed = Trainer(Mixed(), *words, "OPTIM.LAYER_DECAY=0.5")
    allow = {"OPTIM.LAYER_DECAY", "OPTIM.GROUPS"}
    assert resumed.state.restore(captured(whole.state), ALONE, allow, allow) == []
    resumed.one(2)
    fresh = described(*words[2:], "OPTIM.LAYER_DECAY=0.5")
    names = {id(p): n for n, p in resumed.state.model.named_parameters()}
    for g in resumed.state.optimizers[""].param_groups:
        for p in g["params"]:
            assert (
                g["lr"] == fresh[names[id(p)]]["lr"]
                and "momentum_buffer" in (resumed.state.optimizers[""].state[p])
            )


def test_what_had_a_course_and_has_none_now_is_what_the_config_says() -> None:
    words = ("TRAIN.DURATION=9step", "OPTIM.WEIGHT_DECAY=0.01")
    courses = (
        *("OPTIM.SCHEDULE=linear", "OPTIM.WEIGHT_DECAY_SCHEDULE=linear"),
        *("OPTIM.WEIGHT_DECAY_FACTOR=10", "OPTIM.MOMENTUM_SCHEDULE=linear"),
        "OPTIM.MOMENTUM_FACTOR=0.5",
    )
    for name, key in (("sgd", "momentum"), ("adamw", "betas")):
        whole = Trainer(Mixed(), *words, *courses, f"OPTIM.NAME={name}")
        whole.state.progress.step = 6
        whole.one(6)
        resumed, plain = (Trainer(Mixed(), *words, f"OPTIM.NAME={name}") for _ in range(2))
        changed = {key.partition("=")[0] for key in courses}
        resumed.state.restore(captured(whole.state), ALONE, changed, changed)
        for trainer in (resumed, plain):
            trainer.one(7)
        ours, theirs = (t.state.optimizers[""].param_groups[0] for t in (resumed, plain))
        moved = whole.state.optimizers[""].param_groups[0]
        for value in ("lr", "weight_decay", key):
            assert ours[value] == theirs[value] != moved[value], value


def test_groups_are_frozen_and_thawed_with_their_weights() -> None:
    words = ("MODEL.FREEZE=[body]", "MODEL.THAW=['body.3@2step']", *GROUPED)
    trainer = Trainer(Mixed(), *words, "OPTIM.WARMUP=1step")
    for step in range(4):
        trainer.state.progress.step = step
        trainer.one(step)

    def make(m: Any) -> list[Any]:
        m["body"].requires_grad_(False)
        m["body"][3].requires_grad_(True)
        model = m
        flat = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
        head = list(m["head"].parameters())
        lr = {"lr": 0.3}
        groups = [
            group([m["table"].weight, m["body"][3].weight]),
            group([p for p in flat if p is not head[1]], weight_decay=0),
            group(head[:1], **lr),
            group(head[1:], **lr, weight_decay=0),
        ]
        m["body"].requires_grad_(False)
        return [torch.optim.SGD(groups, **SGD)]

    def before(optimizers: list[Any], step: int) -> None:
        for g in optimizers[0].param_groups:
            g["lr"] = g.setdefault("base", g["lr"]) * (0.5 if step == 0 else 1)
        if step == 2:
            for g in optimizers[0].param_groups:
                for p in g["params"]:
                    p.requires_grad_(True)

    assert_close(trainer.weights, by_hand(Mixed(), make, 4, before))


def test_a_task_may_make_its_phases_from_the_config() -> None:
    class Phases(Mixed):
        def build_optimizer(self, model: Any) -> Any:
            cfg = config(*GROUPED[:3], "OPTIM.GROUPS=['*0.weight LR_SCALE=3']")
            return {"body": from_config(cfg, model["body"])}

    model: Any = Phases().build_model()
    optimizer = Phases().build_optimizer(model)["body"]
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([0.1, 0.1, 0.3])


def test_in_any_order_of_entries_the_last_one_wins() -> None:
    entries = ["head LR=1", "*.bias LR=2", "head.bias LR=3"]
    for order in itertools.permutations(entries):
        found = described(f"OPTIM.GROUPS={list(order)}")
        fits = [entry for entry in order if entry.split()[0] in ("head", "*.bias", "head.bias")]
        assert found["head.bias"]["lr"] == float(fits[-1][-1])
