"""Weights from files: what is read, what fits a model, and what is told of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.checkpoint.store import CheckpointStore
from launcher.errors import UsageError
from launcher.models.weights import load_weights, match, read_weights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


WEIGHTS = {k: v.clone() for k, v in model().state_dict().items()}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in WEIGHTS.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "module.model."]
)
def test_a_prefix_that_all_names_share_is_taken_off(prefix: str) -> None:
    fitting, report = match(prefixed(prefix), model())
    assert same(fitting, WEIGHTS) and report == ""


def test_a_prefix_of_the_model_itself_stays() -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

    fitting, report = match(prefixed("model."), Wraps())
    assert same(fitting, prefixed("model.")) and report == ""


def test_what_does_not_fit_is_grouped_and_shown() -> None:
    weights = dict(WEIGHTS)
    del weights["1.running_mean"]
    weights["0.bias"] = torch.zeros(5)
    weights["head.weight"] = torch.zeros(1)
    fitting, report = match(weights, model())
    assert report.splitlines() == [
        "  1 missing: 1.running_mean",
        "  1 unexpected: head.weight",
        "  1 of another shape: 0.bias (5,), the model has (2,)",
    ]
    assert fitting.keys() == WEIGHTS.keys() - {"0.bias", "1.running_mean"}


def test_long_groups_are_cut() -> None:
    _, report = match({**WEIGHTS, **{f"x{i:02d}": torch.zeros(1) for i in range(20)}}, model())
    assert report.startswith("  20 unexpected: x00; ") and report.endswith("x07; ...")


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state", "model_state_dict"])
def test_read_a_file_of_torch(tmp_path: Path, key: str | None) -> None:
    torch.save(WEIGHTS if key is None else {key: WEIGHTS, "epoch": 3}, tmp_path / "w.pt")
    weights, step = read_weights(tmp_path / "w.pt")
    assert same(weights, WEIGHTS) and step is None


def test_read_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(WEIGHTS, tmp_path / "w.safetensors")
    weights, step = read_weights(tmp_path / "w.safetensors")
    assert same(weights, WEIGHTS) and step is None


def checkpoint(folder: Path) -> Path:
    averaged = {f"module.{k}": v.double() + 1 for k, v in WEIGHTS.items()}
    position = {"step": 12, "epoch": 1, "samples": 96}
    ema = {"n_averaged": torch.tensor(4), **averaged}
    return CheckpointStore(folder / "checkpoints").commit(
        {"model": WEIGHTS, "ema": ema, "progress": position},
        {**position, "world_size": 1, "metrics": {}},
    )


@pytest.mark.parametrize("file", [False, True], ids=["directory", "state.pt"])
@pytest.mark.parametrize("ema", [False, True])
def test_read_a_checkpoint(tmp_path: Path, file: bool, ema: bool) -> None:
    path = checkpoint(tmp_path)
    weights, step = read_weights(path / "state.pt" if file else path, ema)
    expected = {k: v.double() + 1 for k, v in WEIGHTS.items()} if ema else WEIGHTS
    assert same(weights, expected) and step == 12


def test_a_checkpoint_without_averaged_weights_is_told(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "ema": None}, tmp_path / "state.pt")
    with pytest.raises(UsageError, match=r"no averaged weights: MODEL\.EMA_DECAY was 0"):
        read_weights(tmp_path / "state.pt", ema=True)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "epoch": 2}))
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("w.pt", [1, 2], "holds no state_dict but a list"),
        ("w.pt", torch.zeros(2), "holds no state_dict but a Tensor"),
        ("w.pt", {"lr": 0.1, "name": "x"}, "names and tensors are needed"),
        ("w.pt", b"junk", r"w\.pt"),
        ("w.pt", nn.Linear(1, 1), r"w\.pt"),  # a whole pickled module is not unpickled
        ("w.safetensors", b"junk", r"w\.safetensors"),
        ("absent.pt", None, "absent"),
        ("absent.safetensors", None, "absent"),
        ("absent/step_3", None, "absent"),
    ],
)
def test_what_holds_no_weights_is_told(tmp_path: Path, name: str, content: Any, told: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UsageError, match=told) as caught:
        read_weights(path)
    assert caught.value.exit_code == 2


SHIFTED = {k: v + 1 for k, v in WEIGHTS.items()}
IN_PART = {**SHIFTED, "0.bias": torch.zeros(5)}


@pytest.mark.parametrize(
    ("weights", "strict"),
    [(IN_PART, True), ({"other": torch.zeros(1)}, False)],
    ids=["in part, but strict", "not at all"],
)
def test_weights_that_do_not_fit_are_an_error(
    tmp_path: Path, weights: dict[str, torch.Tensor], strict: bool
) -> None:
    torch.save(weights, tmp_path / "w.pt")
    made = model()
    with pytest.raises(UsageError, match="do not fit the model") as caught:
        load_weights(tmp_path / "w.pt", made, strict)
    assert match(weights, made)[1] in str(caught.value)
    assert "MODEL.WEIGHTS_STRICT False" in str(caught.value)
    assert same(made.state_dict(), WEIGHTS)


def test_what_fits_is_loaded_if_not_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(IN_PART, tmp_path / "w.pt")
    made = model()
    load_weights(tmp_path / "w.pt", made, strict=False)
    assert same(made.state_dict(), {**SHIFTED, "0.bias": WEIGHTS["0.bias"]})
    assert "fit in part" in caplog.text
