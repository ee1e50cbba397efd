"""Models as they come: names, what is a rank's own, bits; and files of somebody else's."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.edges.model import (
    averaged,
    bits,
    check_model,
    load_model_state,
    model_state,
    own_buffers,
    warn_of_one_sample,
)
from launcher.errors import UsageError
from launcher.models.weights import load_weights, match, read_weights


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def compiled_inside() -> nn.Module:
    made = net()
    made[0] = torch.compile(made[0], backend="eager")  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    "wrap", [lambda: torch.compile(net(), backend="eager"), compiled_inside, net]
)
def test_names_are_those_of_the_model_as_it_is_written(wrap: object) -> None:
    """Both ways, with the versions of the modules' states, which batch-norm asks for."""
    plain, wrapped = net(), wrap()  # type: ignore[operator]
    state = model_state(wrapped)
    assert list(state) == list(plain.state_dict())
    assert state._metadata.keys() == plain.state_dict()._metadata.keys()  # type: ignore[attr-defined]
    load_model_state(plain, state)
    other = wrap()  # type: ignore[operator]
    load_model_state(other, plain.state_dict())
    for name, value in model_state(other).items():
        assert torch.equal(value, state[name])


def test_all_but_the_statistics_of_norms_is_a_ranks_own() -> None:
    model = net()
    model.register_buffer("queue", torch.zeros(3))
    model.register_buffer("centre", torch.zeros(3), persistent=False)
    assert set(own_buffers(model)) == {"queue", "centre"}
    assert set(own_buffers(model, ["cent*"])) == {"queue"}


def test_bits_tell_tensors_apart_and_not_their_layouts() -> None:
    x = torch.randn(2, 3, 4, 4)
    turned = x.to(memory_format=torch.channels_last)
    odd = x.clone()
    odd[1, 2, 3, 3] = torch.nextafter(odd[1, 2, 3, 3], torch.tensor(9.0))
    found = bits({"x": x, "turned": turned, "odd": odd, "half": x.half(), "none": x[:0]})
    assert found["x"] == found["turned"] != found["odd"] and found["none"] == 0
    kinds = {str(t): torch.ones(3).to(t) for t in (torch.bool, torch.int16, torch.complex64)}
    assert all(bits(kinds).values()) and bits({}) == {}


def test_a_tied_weight_that_a_file_holds_once_is_not_missing() -> None:
    """As files of safetensors do."""
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight  # type: ignore[assignment]
    weights = {"0.weight": torch.ones(5, 3)}
    fitting, report = match(weights, tied)
    assert report == "" and fitting.keys() == weights.keys()
    untied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    assert "1 missing: 1.weight" in match(weights, untied)[1]


def test_a_file_of_other_objects_says_what_it_holds_and_how_to_convert_it(tmp_path: Path) -> None:
    path, model = tmp_path / "theirs.pth", net()
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UsageError, match=r"argparse\.Namespace") as caught:
        read_weights(path)
    told = str(caught.value)
    assert told.count("\n") == 1 and len(told) < 600
    line = told.splitlines()[1].strip()
    assert line.startswith('python -c "') and line.endswith('"')
    subprocess.run([sys.executable, "-c", line[len('python -c "') : -1]], check=True)
    load_weights(tmp_path / "theirs.pth.weights", net())


@pytest.mark.parametrize(
    ("resting", "told"), [([], True), (["1"], False), ([""], True)], ids=["trains", "rests", "all"]
)
def test_one_sample_is_warned_of_where_a_norm_would_train_on_it(
    resting: list[str], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where the task put it into eval mode; a whole model that rests is put to training."""
    model = net()
    for name in resting:
        model.get_submodule(name).eval()
    warn_of_one_sample(model)
    warn_of_one_sample(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    lines = [line for line in caplog.messages if "1 sample" in line]
    assert len(lines) == told and all("TRAIN.DROP_LAST True" in line for line in lines)


def test_an_average_of_a_model_that_cannot_be_copied_names_its_key() -> None:
    normed = torch.nn.utils.weight_norm(nn.Linear(2, 2))  # the old one: its weight is no leaf
    normed(torch.ones(1, 2))
    with pytest.raises(UsageError, match=r"MODEL\.EMA_DECAY .*parametrizations\.weight_norm"):
        averaged(normed, 0.9)
    averaged(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 0.9)


def test_a_model_that_does_not_take_its_own_state_back_is_refused() -> None:
    class OneWay(nn.Linear):
        def state_dict(self, *args: Any, **options: Any) -> Any:
            return {f"net.{name}": value for name, value in super().state_dict().items()}

    with pytest.raises(UsageError, match=r"(?s)own state_dict, .* never resumed: .*net\.weight"):
        check_model(OneWay(2, 2))
