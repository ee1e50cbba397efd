"""Optimisers from OPTIM.*, or the task's own."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from launcher.edges.optimizer import rates
from launcher.errors import UsageError
from launcher.optim.optimizers import build_optimizers
from tests.checkpoint.test_state import captured
from tests.engine.helpers import ALONE, Trainer, assert_close, config, same
from tests.optim import own
from tests.optim.hand import Mixed, by_hand

OWN = own.__file__


class Own:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def build_optimizer(self, model: nn.Module) -> Any:
        return self.answer(model.parameters())


@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        (
            "LR=0.3 MOMENTUM=0.8 WEIGHT_DECAY=0.01",
            SGD,
            {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "nesterov": False, "fused": True},
        ),
        ("NESTEROV=true", SGD, {"nesterov": True, "momentum": 0.9}),
        (
            "NAME=adamw LR=1e-3 BETAS=[0.8,0.9]",
            AdamW,
            {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0, "fused": True},
        ),
        ("NAME=adamw EPS=1e-6 WEIGHT_DECAY=0.05", AdamW, {"eps": 1e-6, "weight_decay": 0.05}),
    ],
)
def test_optimiser_of_a_config(words: str, kind: type, options: dict[str, Any]) -> None:
    cfg = config(*(f"OPTIM.{word}" for word in words.split()))
    optimizer = build_optimizers(cfg, object(), nn.Linear(2, 2))[""]
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizers(config(), object(), model)[""].param_groups
    assert [id(p) for p in group["params"]] == [id(model.weight)]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(1, 1).requires_grad_(False)])
def test_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="no parameter to train"):
        build_optimizers(config(), object(), model)[""]


def test_the_tasks_own_wins() -> None:
    optimizer = build_optimizers(config(), Own(torch.optim.Adagrad), nn.Linear(1, 1))[""]
    assert isinstance(optimizer, torch.optim.Adagrad)


def test_the_tasks_own_must_be_an_optimiser() -> None:
    with pytest.raises(UsageError, match=r"Own\.build_optimizer must return .* not list"):
        build_optimizers(config(), Own(list), nn.Linear(1, 1))[""]


@pytest.mark.parametrize("words", [["NAME", "adamw"], ["WEIGHT_DECAY", "0.1"]])
def test_sparse_gradients_are_refused_where_no_kernel_takes_them(words: list[str]) -> None:
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))
    with pytest.raises(
        UsageError, match=r"OPTIM\.NAME sgd without OPTIM\.WEIGHT_DECAY.*SparseAdam"
    ):
        build_optimizers(config(f"OPTIM.{words[0]}", words[1]), object(), model)[""]
    optimizer = build_optimizers(config(), object(), model)[""]
    assert type(optimizer) is SGD and not optimizer.param_groups[0]["fused"]


OPTIM = torch.optim
DECAY: Any = {"weight_decay": 0.1}
MAKES: list[tuple[str, Any]] = [
    ("NAME=sgd NESTEROV=true", lambda p: OPTIM.SGD(p, 0.01, 0.9, weight_decay=0.1, nesterov=True)),
    (
        "NAME=adam ARGS=[amsgrad=true]",
        lambda p: OPTIM.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    ),
    ("NAME=adamw EPS=1e-3", lambda p: OPTIM.AdamW(p, 0.01, eps=1e-3, weight_decay=0.1)),
    ("NAME=nadam BETAS=[0.5,0.9]", lambda p: OPTIM.NAdam(p, 0.01, (0.5, 0.9), weight_decay=0.1)),
    ("NAME=radam", lambda p: OPTIM.RAdam(p, 0.01, weight_decay=0.1)),
    (
        "NAME=rmsprop MOMENTUM=0.7 ARGS=[alpha=0.9]",
        lambda p: OPTIM.RMSprop(p, 0.01, 0.9, momentum=0.7, weight_decay=0.1),
    ),
    ("NAME=adagrad EPS=1e-5", lambda p: OPTIM.Adagrad(p, 0.01, eps=1e-5, weight_decay=0.1)),
    ("NAME=adafactor ARGS=[d=2.0]", lambda p: OPTIM.Adafactor(p, 0.01, d=2.0, weight_decay=0.1)),
    ("NAME=torch.optim:Adamax", lambda p: OPTIM.Adamax(p, 0.01, weight_decay=0.1)),
    (f"NAME={OWN}:Signs ARGS=[beta=5e-1]", lambda p: own.Signs(p, 0.01, 0.1, 0.5)),
]


@pytest.mark.parametrize(("words", "make"), MAKES, ids=[words for words, _ in MAKES])
def test_it_trains_as_the_one_made_by_hand(words: str, make: Any) -> None:
    keys = [f"OPTIM.{word}" for word in ("LR=0.01", "WEIGHT_DECAY=0.1", *words.split())]
    trainer = Trainer(Mixed(), *keys)
    trainer.run(5)
    expected = by_hand(Mixed(), lambda model: [make(model.parameters())], 5)
    assert_close(trainer.weights, expected, rtol=1e-4)


def test_fused_is_chosen_where_the_class_has_it_and_what_is_asked_for_counts() -> None:
    def group(*words: str) -> dict[str, Any]:
        return build_optimizers(config(*words), object(), nn.Linear(2, 2))[""].param_groups[0]

    for name in ("sgd", "adam", "adamw", "adagrad"):
        assert group(f"OPTIM.NAME={name}")["fused"], name
    for name in ("nadam", "radam", "rmsprop", "adafactor"):
        assert not group(f"OPTIM.NAME={name}").get("fused"), name
    assert not group("OPTIM.NAME=adamw", "OPTIM.ARGS=[foreach=true]")["fused"]
    assert not group("TRAIN.PRECISION=fp16")["fused"]
    assert group("TRAIN.PRECISION=fp16", "OPTIM.MOMENTUM=0")["fused"]
    with pytest.raises(UsageError, match="no fused=true for sgd with momentum"):
        group("TRAIN.PRECISION=fp16", "OPTIM.ARGS=[fused=true]")


def muon(model: Any, rate: float = 0.02, adamw: float = 0.003) -> list[Any]:
    matrices = [model["body"][0].weight, model["body"][3].weight, model["head"].weight]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        OPTIM.Muon(matrices, rate, 0.1, 0.8, False),
        OPTIM.AdamW(rest, adamw, (0.7, 0.9), 1e-6, 0.1),
    ]


MUON = (
    *("OPTIM.NAME=muon", "OPTIM.LR=0.02", "OPTIM.ADAMW_LR=0.003", "OPTIM.WEIGHT_DECAY=0.1"),
    *("OPTIM.MOMENTUM=0.8", "OPTIM.BETAS=[0.7,0.9]", "OPTIM.EPS=1e-6"),
)


def test_muon_takes_matrices_and_adamw_the_rest_under_one_schedule() -> None:
    words = (*MUON, "OPTIM.SCHEDULE=linear", "TRAIN.DURATION=8step", "TRAIN.GRAD_CLIP=100")
    trainer = Trainer(Mixed(), *words)

    def falls(optimizers: Any, step: int) -> None:
        for optimizer, rate in zip(optimizers, (0.02, 0.003), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 8)

    for step in range(5):
        trainer.state.progress.step = step
        trainer.one(step)
    assert_close(trainer.weights, by_hand(Mixed(), muon, 5, falls), rtol=1e-4)
    found = rates(trainer.state.optimizers)
    assert found == pytest.approx(
        {"train/lr": 0.01, "train/lr/muon": 0.01, "train/lr/adamw": 0.0015}
    )


def test_muon_goes_on_from_a_checkpoint_and_groups_say_what_it_takes() -> None:
    words = (*MUON, "OPTIM.GROUPS=['head MUON=false LR=0.005']")
    whole = Trainer(Mixed(), *words)
    whole.run(3)
    resumed = Trainer(Mixed(), *words)
    resumed.state.restore(captured(whole.state), ALONE)
    for trainer in (whole, resumed):
        trainer.one(3)
    assert same(whole.weights, resumed.weights)
    optimizer = resumed.state.optimizers[""]
    assert [(g["name"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        ("muon", 0.02, 2),
        ("adamw", 0.003, 6),
        ("adamw/head", 0.005, 2),
    ]
    assert len(optimizer.state) == 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ARGS=[amsgrod=true]", r"SGD takes no amsgrod"),
        ("NAME=adam ARGS=[amsgrd=true]", r"Adam takes no amsgrd \(did you mean amsgrad\?\)"),
        ("NAME=adam ARGS=[amsgrad=true,fused=true,foreach=true]", r"Adam\(.*foreach=True\): .*"),
        (f"NAME={OWN}:Sign", r"has no class Sign \(did you mean Signs\?\)"),
        (f"NAME={OWN}:Fails", r"Fails\(lr=0.1\): no rate is good enough"),
        (f"NAME={OWN}:Plain WEIGHT_DECAY=0.1", r"Plain takes no weight_decay"),
        (f"NAME={OWN}:Plain GROUPS=['bias*WEIGHT_DECAY=0']", r"Plain takes no weight_decay"),
        (f"NAME={OWN}:Plain SKIP_NORM_DECAY=true", r"Plain takes no weight_decay"),
        ("NAME=collections:OrderedDict", r"OrderedDict is no optimiser: it has no step"),
        ("NAME=torch.optim:LBFGS", r"several times a step"),
        ("NAME=muon GROUPS=['bias*MUON=true']", r"bias has MUON=true and a weight of shape \(2,\)"),
        ("NAME=muon GROUPS=['weight*EPS=0.1']", r"weight has BETAS or EPS, which adamw alone"),
        ("NAME=muon GROUPS=['weight*MUON=false']", r"the model has no matrix for it"),
        ("NAME=adagrad MOMENTUM_SCHEDULE=linear", r"Adagrad has no momentum"),
        (
            "GROUPS=['bias*MOMENTUM=0.99'] MOMENTUM_SCHEDULE=linear MOMENTUM_FACTOR=1.05",
            r"MOMENTUM_SCHEDULE: 0\.99 would get to 1",
        ),
    ],
)
def test_what_no_optimiser_can_be_made_of(words: str, told: str) -> None:
    keys = [f"OPTIM.{word.replace('*', ' ')}" for word in words.split()]
    with pytest.raises(UsageError, match=told):
        build_optimizers(config(*keys), object(), nn.Linear(2, 2))


def test_an_optimiser_that_this_torch_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=rf"muon: torch {torch.__version__[:3]}.* has no Muon yet"):
        build_optimizers(config("OPTIM.NAME=muon"), object(), nn.Linear(2, 2))


def test_sparse_weights_may_go_without_decay_beside_others_that_have_some() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))
    words = ("OPTIM.WEIGHT_DECAY=0.1", "OPTIM.GROUPS=['\"0\" WEIGHT_DECAY=0']")
    optimizer = build_optimizers(config(*words), object(), model)[""]
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.1]
    with pytest.raises(UsageError, match="sparse gradients"):
        build_optimizers(config("OPTIM.GROUPS=['\"0\" WEIGHT_DECAY=0.1']"), object(), model)


def test_keys_that_an_own_optimiser_does_not_read_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ("OPTIM.GROUPS=['bias LR_SCALE=2']", "OPTIM.LAYER_DECAY=0.5", "OPTIM.LR=3")
    build_optimizers(config(*words), Own(torch.optim.SGD), nn.Linear(1, 1))
    assert caplog.messages == [
        "Own.build_optimizer makes the optimiser: OPTIM.GROUPS and OPTIM.LAYER_DECAY counts only "
        "where that reads it"
    ]
