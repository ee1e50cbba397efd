"""What a step pays beyond the model's own work, in counts: no time is measured here."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine import helpers
from tests.engine.helpers import Regression, Trainer, drawn

BATCH = 8


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device; views cost no kernel, and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's part is left out."""
    batch = drawn(Regression(), 0, 0, BATCH)
    monkeypatch.setattr(helpers, "drawn", lambda *_: batch)


def operations(call: Callable[[], Any]) -> Counter[str]:
    call()  # what is made once
    with Counting() as counting:
        call()
    return counting.counts


def by_hand() -> Counter[str]:
    """A step of plain torch, with the update that the launcher chooses."""
    task = Regression()
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
    batch = drawn(task, 0, 0, BATCH)

    def step() -> None:
        task.train_step(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return operations(step)


# The norm of the gradients that is recorded: one operation over all, their norms put together, and
# the norm of these. Two values are recorded, and read on the CPU at once.
NORM = Counter({"aten._foreach_norm.Scalar": 1, "aten.stack.default": 1})
NORM["aten.linalg_vector_norm.default"] = 1
READ = Counter({"aten._local_scalar_dense.default": 3})


def test_operations_of_a_step_beyond_those_of_plain_torch(same_batch: None) -> None:
    trainer = Trainer(Regression(), "OPTIM.MOMENTUM", 0.9, batch=BATCH)
    found = operations(lambda: trainer.one(0))
    assert found - by_hand() == NORM + READ and by_hand() - found == Counter()


def test_a_step_opens_no_file_and_starts_no_process_or_thread() -> None:
    trainer, seen = Trainer(Regression(), batch=BATCH), Counter[str]()
    trainer.run(3)
    watching = True

    def audit(event: str, arguments: Any) -> None:
        if watching and event.split(".")[0] in ("open", "os", "subprocess", "socket", "_thread"):
            seen[event] += 1

    sys.addaudithook(audit)  # which stays, and does nothing afterwards
    trainer.run(5)
    watching = False
    assert seen == Counter()


def test_calls_of_a_step_do_not_grow_with_the_model(same_batch: None) -> None:
    """Of Python, beyond those of the model's own modules and of torch's optimiser."""

    def calls(depth: int) -> int:
        class Deep(Regression):
            def build_model(self) -> torch.nn.Module:
                layers = [torch.nn.Linear(4, 4) for _ in range(depth)]
                return torch.nn.Sequential(*layers, torch.nn.Linear(4, 1))

        trainer, count = Trainer(Deep(), batch=BATCH), 0
        trainer.run(3)

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call" and "/launcher/" in frame.f_code.co_filename

        sys.setprofile(profile)
        try:
            trainer.one(3)
        finally:
            sys.setprofile(None)
        return count

    assert calls(2) == calls(40) < 80
