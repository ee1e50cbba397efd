"""What is told of a model at the start, and of its first step."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launcher.callbacks import Callbacks, shipped
from launcher.callbacks.model_summary import (
    ROWS,
    ModelSummary,
    Saved,
    flops,
    guessed,
    keeps,
    measured,
    size,
    summary,
)
from launcher.config import defaults
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from tests.callbacks.helpers import CPU, view
from tests.engine.helpers import Trainer
from tests.engine.test_phases import Game


class Tied(nn.Module):
    """An embedding that is its own output layer; a frozen part, and one that is so in part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.body[0].requires_grad_(False)
        self.out = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"logits": self.head(self.out(self.body(self.embed(x))))}


def row(text: str, name: str) -> list[str]:
    (found,) = (line.split() for line in text.splitlines()[1:] if line.split()[0] == name)
    return found[1:]


def test_parameters_by_module() -> None:
    told = summary(Tied(), "x")
    head = told.splitlines()[0]
    # A weight that two modules have counts once.
    assert head.startswith("Tied: 88 parameters, 48 of them trainable and 40 frozen; ")
    assert "weights 352 B" in head and "gradients 192 B" in head
    assert "buffers 40 B" in head  # of batch-norm: twice four numbers, and a count of 8 bytes
    assert row(told, "embed") == ["Embedding", "40", "trainable"] and row(told, "head")[1] == "40"
    assert row(told, "body") == ["Sequential", "28", "8", "trainable"]
    assert row(told, "body.0") == ["Linear", "20", "frozen"]
    assert row(told, "out") == ["Linear", "20", "frozen"]


def test_a_lazy_weight_is_told_of() -> None:
    told = summary(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "x")
    assert "4 parameters" in told and "2 lazy ones have no shape yet" in told


def test_a_deep_model_stays_readable() -> None:
    blocks = [nn.Sequential(nn.Linear(1, 1), nn.ReLU()) for _ in range(ROWS)]
    told = summary(nn.Sequential(*blocks, nn.Linear(1, 1)), "x")
    assert len(told.splitlines()) == 1 + ROWS + 1
    assert told.splitlines()[-1] == "  and 1 modules more" and "  0.0" not in told


def stepped(optimizer: Any) -> Any:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("made", "copies"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True), 3),
        (lambda p: torch.optim.Adagrad(p), 1),
        (lambda p: torch.optim.NAdam(p), 2),
        (lambda p: torch.optim.RAdam(p), 2),
        (lambda p: torch.optim.Adamax(p), 2),
        (lambda p: torch.optim.Adadelta(p), 2),
    ],
)
def test_the_guess_of_an_optimiser_is_what_it_keeps(made: Any, copies: int) -> None:
    optimizer = made([torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(24))])
    assert guessed(optimizer) == copies * 4096
    # Beside these a few numbers, such as the count of steps.
    assert abs((measured([stepped(optimizer)]) or 0) - copies * 4096) < 64


def test_an_optimiser_that_is_not_known_is_not_guessed_at() -> None:
    class Mine(torch.optim.SGD):
        pass

    parameters = [torch.nn.Parameter(torch.ones(4))]
    known, mine = torch.optim.SGD(parameters, 0.1), Mine(parameters, 0.1)
    assert guessed(mine) is None
    assert keeps([known, mine], None) == "optimiser state known after the first step"
    assert keeps([known], None) == "optimiser state about 0 B"
    assert keeps([mine], 2048) == "optimiser state 2.00 KiB"
    assert measured([object()]) is None  # of any make


def test_what_the_forward_pass_keeps() -> None:
    """Of 8 rows: the input of each linear layer, and the ReLU's output, which is the next one's
    input: it counts once in the whole, and where both keep it at each."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
    hooks = ExitStack()
    saved = Saved(model, hooks)
    loss = model(torch.ones(8, 16)).sum()
    hooks.close()
    loss.backward()
    one, two = 8 * 16 * 4, 8 * 32 * 4
    totals = {name: sum(found.values()) for name, found in saved.found.items()}
    assert totals == {"": one + two, "0": one, "1": two, "2": two}
    model(torch.ones(8, 16)).sum()
    assert totals == {name: sum(found.values()) for name, found in saved.found.items()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def trained(count: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Weights and random state after two steps of two micro-batches."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
    run = view(model=model, COUNT_FLOPS=count)
    optimizer = torch.optim.AdamW(model.parameters())
    run.optimizers.update({"": optimizer})
    told = ModelSummary(run)
    told.on_start()
    hooks = Callbacks([told])
    for _ in range(2):
        hooks.call("before_step", 4)
        for _ in range(2):
            loss = model(torch.randn(2, 4)).square().mean()
            hooks.call("on_backward", loss)
            loss.backward()
        optimizer.step()
        told.on_step()
    return [p.detach() for p in model.parameters()], torch.get_rng_state()


def test_it_leaves_no_trace_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "launcher")
    (ours, our_state), (theirs, their_state) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(our_state, their_state)
    assert caplog.text.count("kept for the backward pass") == 1  # and not where it is not asked for
    assert caplog.text.count("the optimiser keeps") == 2


def test_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the allocator's books, once: before a step with samples, and after its forward pass."""
    caplog.set_level(logging.INFO, "launcher")
    taken = iter([100 << 20, 350 << 20])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(taken))
    told = ModelSummary(view(device=torch.device("cuda", 0)))
    for samples in (0, 4, 4):
        told.before_step(samples)
        for _ in range(2):
            told.on_backward(torch.zeros(()))
    (line,) = caplog.messages
    assert line.endswith("take 250.00 MiB of the GPU's memory")


def test_a_run_that_goes_on_tells_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "launcher")
    model = nn.Linear(4, 1)
    run = view(model=model)
    run.optimizers.update({"": stepped(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))})
    told = ModelSummary(run)
    told.on_start()
    told.on_step()
    assert "optimiser state 20 B" in caplog.text and "the optimiser keeps" not in caplog.text


def counted(outer: nn.Module, model: nn.Module) -> str:
    with FlopCounterMode(display=False) as counter:
        outer(torch.ones(2, 4)).sum().backward()
    return flops(counter.get_flop_counts(), model, 2)


def test_flops_by_module() -> None:
    class StepModule(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) @ torch.ones(1, 3)  # outside of the model

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    told = counted(StepModule(model), model)
    first, last, outside = 2 * 2 * 4 * 8, 3 * 2 * 8, 2 * 2 * 3
    whole = f"{first + last + outside:,}"
    assert told.splitlines()[0].endswith(f"forward and backward: {whole}")
    assert row(told, "0") == [str(first)] and row(told, "2") == [str(last)]
    assert row(told, "elsewhere") == [str(outside)]


def test_parts_of_a_model_that_are_called_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """FlopCounterMode cannot tell which they are: nothing is said of them but their sum."""
    caplog.set_level(logging.INFO, "launcher")
    trainer = Trainer(Game(), "LOG.COUNT_FLOPS", True)
    trainer.one(0)
    trainer.state.callbacks.call("on_step")
    (told,) = (m for m in caplog.messages if m.startswith("FLOPs of a sample by module"))
    total = told.splitlines()[0].split()[-1]
    assert [line.split() for line in told.splitlines()[1:]] == [["elsewhere", total]]


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        *("0 B", "1023 B", "1.00 KiB", "3.00 MiB", "5120.00 GiB"),
    ]


@pytest.mark.parametrize(
    ("rank", "asked", "there"), [(0, True, True), (0, False, False), (1, True, False)]
)
def test_rank_0_tells_it(rank: int, asked: bool, there: bool) -> None:
    cfg = defaults()
    cfg.LOG.MODEL_SUMMARY = asked
    runtime = Runtime(Topology(rank=rank, world_size=2), CPU, CpuBudget(1, 1, 1, ""))
    assert (ModelSummary in shipped(cfg, None, runtime)) == there
