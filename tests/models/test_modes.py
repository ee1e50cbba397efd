"""How a model is run, beside the same model as torch runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import Task
from launcher.errors import UsageError
from launcher.models import modes
from launcher.models.modes import compiled_parts, set_modes
from tests.edges.test_zoo import same
from tests.engine.helpers import config
from tests.system import jobs
from tests.system.exact import records
from tests.system.exact_task import Centre

AFRESH = ("MODEL.ACTIVATION_CHECKPOINT",)


class Scaled(nn.Module):
    """Keeps its buffer for the backward pass, moves it afterwards, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        out = x * self.scale
        self.scale = self.scale * 0.9 + 0.1 * x.detach().abs().mean(0)
        return out


def net() -> nn.Sequential:
    torch.manual_seed(3)

    def block() -> nn.Sequential:
        parts = nn.Linear(6, 6), nn.BatchNorm1d(6), Centre(6), Scaled(), nn.ReLU(), nn.Dropout(0.4)
        return nn.Sequential(*parts)

    return nn.Sequential(block(), block(), nn.Linear(6, 1))


def trained(model: nn.Module, steps: int = 4) -> tuple[Any, ...]:
    """What steps of plain torch leave, and gradients, and the generator's state."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 6)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    grads = [p.grad for p in model.parameters()]
    return dict(model.state_dict()), grads, torch.get_rng_state()


@pytest.mark.parametrize("patterns", [["0", "1"], ["*"], ["0.0", "0.3", "1.*"]])
def test_what_is_computed_again_is_the_same(patterns: list[str]) -> None:
    """Weights, gradients, buffers and random numbers, to the last bit; names and copies too."""
    plain, model = net(), net()
    set_modes(config(*AFRESH, patterns), model)
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected = trained(plain)
    assert same(trained(model), expected)
    assert same(trained(twin), expected)  # a copy's forward is its own
    counted: Any = model[0][3], plain[0][3]
    assert (counted[0].passes, counted[1].passes) == (8, 4)
    with torch.no_grad():
        model(torch.randn(8, 6))
    assert counted[0].passes == 9


def test_only_inputs_are_kept() -> None:
    """What autograd holds between the passes, counted by torch."""

    def held(model: nn.Module) -> int:
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * (tensor.dim() > 1 and tensor.shape[0] == 512)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(512, 6))
        return kept

    model = net()
    set_modes(config(*AFRESH, ["0", "1"]), model)
    assert held(model) < held(net()) / 2


@pytest.mark.parametrize("pattern", ["blocks.*", "0.weight"])
def test_a_pattern_that_fits_no_module_is_told(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"no module has such a name. There are 0, 0\.0"):
        set_modes(config(*AFRESH, [pattern]), net())


class Images(Task):
    """Convolutions over images; notes how they lie in memory where they are used."""

    strides: list[bool] = []  # noqa: RUF012

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Dropout(0.2), nn.Linear(16, 2)),
        )
        if not self.cfg.MODEL.COMPILE:  # which would not call it
            model[3].register_forward_pre_hook(self.look)
        return model

    def look(self, module: nn.Module, inputs: Any) -> None:
        weight: Any = module.weight
        both = [inputs[0], weight]
        self.strides.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in both))

    def build_dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(2)
        x = torch.randn(22, 3, 6, 6, generator=made)
        return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")}


def words(run: Path, *more: object) -> list[object]:
    sizes = ("TRAIN.BATCH_SIZE", 8, "TRAIN.DURATION", "4ep", "LOG.EVERY", "1step")
    place = ("TASK.NAME", f"{__file__}:Images", "OUTPUT_DIR", run, "OPTIM.LR", "0.02")
    return [*place, *sizes, "CHECKPOINT.EVERY", "2step", "DATALOADER.NUM_WORKERS", 0, *more]


def losses(run: Path) -> list[float]:
    return [v for key in ("train/loss", "val/loss") for v in jobs.values(run, key).values()]


def test_channels_last(tmp_path: Path) -> None:
    """Images and weights lie so in training and evaluation, also of an average, and after a resume
    from an ordinary run's checkpoint; what is computed is the same but for rounding."""
    from launcher import cli

    plain, run = tmp_path / "plain", tmp_path / "run"
    Images.strides.clear()
    assert cli.main(["train", *map(str, words(plain, "MODEL.EMA_DECAY", 0.5))]) == 0
    assert not any(Images.strides)
    jobs.train(*words(run, "MODEL.EMA_DECAY", 0.5, "MODEL.CHANNELS_LAST", True)).ok()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
    assert jobs.state(run)["model"].keys() == jobs.state(plain)["model"].keys()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3))
    seen = []
    model[1].register_forward_pre_hook(
        lambda m, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
    )
    set_modes(config("MODEL.CHANNELS_LAST", True), model)
    model(torch.randn(2, 3, 5, 5))
    copy.deepcopy(model).eval()(torch.randn(2, 3, 5, 5))
    assert seen == [True, True]


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in place, or what a container holds, never as torch guesses by what came first."""
    asked: list[Any] = []
    monkeypatch.setattr(modes, "_compile", lambda module, **how: asked.append((module, how)))
    gan = nn.ModuleDict({"critic": nn.Linear(2, 1), "makers": nn.ModuleList([nn.Linear(1, 2)])})
    set_modes(config("MODEL.COMPILE", True, "MODEL.COMPILE_MODE", "reduce-overhead"), gan)
    assert [m for m, _ in asked] == compiled_parts(gan) == [gan["critic"], gan["makers"][0]]  # type: ignore[index]
    assert asked[0][1] == {"mode": "reduce-overhead", "dynamic": False}
    model = nn.Linear(2, 2)
    set_modes(config("MODEL.COMPILE", True, "MODEL.COMPILE_DYNAMIC", True), model)
    assert asked[-1] == (model, {"mode": "default", "dynamic": True})
    set_modes(config(), model)
    assert len(asked) == 3


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("MODEL.ACTIVATION_CHECKPOINT", "['3', '6']")])
def test_a_compiled_run(more: tuple[object, ...], tmp_path: Path) -> None:
    """As the plain one but for rounding, under the same names; and exact over a kill at an epoch's
    last batch, which is of another shape than all before."""
    plain, whole, broken = tmp_path / "plain", tmp_path / "whole", tmp_path / "broken"
    kept = ("MODEL.EMA_DECAY", 0.9, "TRAIN.DURATION", "4ep")
    jobs.train(*words(plain, *kept)).ok()
    how = (*kept, "MODEL.COMPILE", True, *more)
    jobs.train(*words(whole, *how), cold=True).ok()
    # Compiled dropout draws other numbers than torch's.
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], rel=0.1)
    assert jobs.state(whole)["model"].keys() == jobs.state(plain)["model"].keys()
    assert jobs.state(whole)["ema"].keys() == jobs.state(plain)["ema"].keys()
    short = jobs.start(*words(broken, *how), cold=True)
    with short as job:
        jobs.wait_for_save(broken, 2, job)
        job.kill()
    jobs.train(*words(broken, *how), "--resume", cold=True).ok()
    assert records(broken) == records(whole)
    assert same(jobs.state(broken)["model"], jobs.state(whole)["model"])
    assert "nothing was compiled" not in (whole / "logs/rank0.log").read_text()


class Around(Images):
    """Calls what is in the model, and never the model."""

    def train_step(self, model: Any, batch: Any) -> dict[str, Any]:
        out = batch[0]
        for part in model:
            out = part(out)
        return {"loss": nn.functional.cross_entropy(out, batch[1])}


def test_a_model_that_is_not_called_is_told(tmp_path: Path) -> None:
    run, around = tmp_path / "run", ("TASK.NAME", f"{__file__}:Around", "EVAL.EVERY", "")
    short = ("TRAIN.DURATION", "2step", "MODEL.COMPILE", True)
    ended = jobs.train(*words(run, *around, *short)).ok()
    assert ended.err.count("nothing was compiled") == 1
