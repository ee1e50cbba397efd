"""MODEL.INIT and MODEL.REINIT, against torch.nn.init and reset_parameters by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from launcher import Task
from launcher.config.inits import FILLS, parse_init
from launcher.errors import UsageError
from launcher.models.init import initialise, reset, start_weights
from tests.engine.helpers import config, same
from tests.system import jobs

TASK = f"{__file__}:Lines"


class Net(nn.Module):
    """Of several types, with a weight that two modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.out = nn.Linear(6, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.head(self.body(self.embed(x).transpose(1, 2)).transpose(1, 2)))


class Lines(Task):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def build_dataset(self, split: str) -> Any:
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(3))
        return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))

    def train_step(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return {"loss": (model(x) - y).square().mean()}


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def begun(model: nn.Module, *words: object) -> dict[str, Any]:
    start_weights(config(*words), model)
    return state(model)


def test_what_fills_is_what_torch_has() -> None:
    theirs = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    assert sorted(FILLS) == sorted(name.removesuffix("_") for name in theirs)


@pytest.mark.parametrize("seed", [0, 11])
def test_init_is_torch_nn_init_by_hand(seed: int) -> None:
    entries = ["Linear: xavier_uniform", "Conv1d: kaiming_normal(mode=fan_out)"]
    entries += ["*.bias: constant_(0.5)", "Linear.bias: zeros", "head.2: normal(0, std=0.02)"]
    model = Net()
    before = state(model)
    drawn = torch.random.get_rng_state()
    found = begun(model, "SEED", seed, "MODEL.INIT", str(entries))
    assert torch.equal(torch.random.get_rng_state(), drawn)  # nothing else that is random moves
    hand: Any = Net()
    hand.load_state_dict(before)
    torch.manual_seed(seed)
    nn.init.xavier_uniform_(hand.embed.weight)  # which is out.weight, a Linear's
    nn.init.kaiming_normal_(hand.body[0].weight, mode="fan_out")
    nn.init.constant_(hand.body[0].bias, 0.5)
    nn.init.constant_(hand.body[1].bias, 0.5)
    nn.init.xavier_uniform_(hand.head[0].weight)
    nn.init.zeros_(hand.head[0].bias)
    nn.init.normal_(hand.head[2].weight, 0, 0.02)
    nn.init.normal_(hand.head[2].bias, 0, 0.02)
    nn.init.zeros_(hand.out.bias)
    assert same(found, hand.state_dict())
    assert model.out.weight is model.embed.weight


def test_a_subclass_is_of_its_type_and_all_its_weights_are_meant() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "attend": nn.MultiheadAttention(4, 2)})
    biases = {name: value for name, value in state(model).items() if "bias" in name}
    entries = ["LSTM: orthogonal", "MultiheadAttention: ones", "Linear: zeros"]
    initialise(model, [parse_init(text) for text in entries])
    assert torch.allclose(
        model.rnn.weight_hh_l0.T @ model.rnn.weight_hh_l0, torch.eye(4), atol=1e-5
    )
    assert torch.all(model.attend.in_proj_weight == 1)
    assert torch.all(model.attend.out_proj.weight == 0)  # torch's own subclass of Linear
    assert same({n: v for n, v in state(model).items() if "bias" in n}, biases)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["Lineal: zeros"], "near it are Linear"),
        (["haed.0.weight: zeros"], "fits nothing of the model; near it are head.0.weight"),
        (["Linear: kaiming_normal(made=1)"], "unexpected keyword argument 'made'"),
        (["*.bias: xavier_uniform"], r"cannot fill body.0.bias \(6,\): Fan in and fan out"),
        (["head.0.weight: zeros", "Linear: ones"], "fills nothing: the entries after it"),
        (["Embedding: normal", "Linear: ones"], "'Embedding: normal' fills nothing"),  # tied
    ],
)
def test_mistakes_that_need_the_model(entries: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        begun(Net(), "MODEL.INIT", str(entries))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["MODEL.INIT", "[Linear]"], "'Linear' is no entry; write for example"),
        (["MODEL.INIT", "['Linear: xavier_unifrom']"], "did you mean xavier_uniform"),
        (["MODEL.INIT", "['Linear: normal(std=1+x)']"], "must be plain numbers and words"),
        (["MODEL.INIT", "['Linear: a.b()']"], "is no name"),
        (["MODEL.INIT", "['Linear: zeros']", "MODEL.WEIGHTS", "w.pt"], "has no effect where"),
    ],
)
def test_mistakes_that_the_config_shows(words: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        config(*words)


def test_a_parametrised_weight_is_not_passed_over() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(UsageError, match=r"parametrizations\.weight\.original1"):
        begun(model, "MODEL.INIT", "['Linear: zeros']")
    with pytest.raises(UsageError, match="ParametrizationList"):
        begun(model, "MODEL.REINIT", "['0']")


@pytest.mark.parametrize("patterns", [["head.*", "body"], ["head", "body.0.*", "body.1"]])
def test_reinit_is_reset_parameters_by_hand(patterns: list[str], tmp_path: Path) -> None:
    class Older(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))

    weights = state(Older())
    weights["body.1.running_mean"] += 3.0
    torch.save(weights, tmp_path / "w.pt")
    words = ["SEED", 4, "MODEL.WEIGHTS", tmp_path / "w.pt"]
    with pytest.raises(UsageError, match=r"of another shape: head\.0.weight"):
        begun(Net(), *words)
    found = begun(Net(), *words, "MODEL.REINIT", str(patterns))
    hand: Any = Net()
    hand.load_state_dict({n: v for n, v in weights.items() if "head" not in n}, strict=False)
    torch.manual_seed(4)
    for module in (hand.head[2], hand.head[0], hand.body[1], hand.body[0]):  # the inner ones first
        module.reset_parameters()
    assert same(found, hand.state_dict())
    # With INIT, what is made anew is filled by it; what is loaded stays.
    words += ["MODEL.REINIT", str(patterns), "MODEL.INIT", "['Linear: ones', 'Conv1d: ones']"]
    found = begun(Net(), *words)
    assert torch.all(found["head.0.weight"] == 1) and torch.all(found["body.0.weight"] == 1)
    assert same(found["out.weight"], weights["out.weight"])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Forgetful(Bare):
    def reset_parameters(self) -> None:
        self.scale.copy_(self.scale + 1)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("haed", "near it are head"),
        ("head.0.bias", "names a part of head.0.*so that head.0.weight is meant"),
        ("out", "out.weight is also embed.weight, which is not named"),
        ("bare", r"bare \(Bare\) has no reset_parameters"),
        ("forgetful", "does not fill forgetful.scale"),
    ],
)
def test_what_cannot_be_made_anew(pattern: str, told: str) -> None:
    model = Net()
    model.bare, model.forgetful = Bare(), Forgetful()
    with pytest.raises(UsageError, match=told):
        reset(model, [pattern])


def test_a_module_in_two_places_and_attention() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "attend": nn.MultiheadAttention(4, 2)})
    with pytest.raises(UsageError, match=r"also a\.weight, which is not named"):
        reset(model, ["b"])
    assert "a.weight" in reset(model, ["a", "b"])
    hand = copy.deepcopy(model["attend"])
    torch.manual_seed(1)
    hand.out_proj.reset_parameters()
    hand._reset_parameters()
    torch.manual_seed(1)
    reset(model, ["attend"])
    assert same(state(model["attend"]), state(hand))


def test_all_ranks_begin_alike_and_a_resume_does_not_begin(tmp_path: Path) -> None:
    words = ["TASK.NAME", TASK, "EVAL.EVERY", ""]
    words += ["MODEL.INIT", "['Linear: normal(std=0.3)', '*.bias: zeros']", "OPTIM.LR", 1e-30]
    run = tmp_path / "run"
    jobs.train(*words, "OUTPUT_DIR", run, "TRAIN.DURATION", "2step", ranks=2).ok()
    saved = torch.load(next(run.glob("checkpoints/step_2/state.pt")), weights_only=True)
    hand: Any = Lines(config()).build_model()
    torch.manual_seed(0)
    for name, p in hand.named_parameters():
        nn.init.zeros_(p) if "bias" in name else p.ndim == 2 and nn.init.normal_(p, std=0.3)
    for name, p in hand.named_parameters():
        torch.testing.assert_close(saved["model"][name], p.data, rtol=0, atol=1e-20)
    # Another INIT at a resume is no difference: the weights go on.
    words += ["OUTPUT_DIR", run, "TRAIN.DURATION", "4step", "--allow", "TRAIN.DURATION"]
    jobs.train(*words, "MODEL.INIT", "['Linear: ones']", "--resume").ok()
    again = torch.load(run / "checkpoints/step_4/state.pt", weights_only=True)["model"]
    assert same(again["0.weight"], saved["model"]["0.weight"])
