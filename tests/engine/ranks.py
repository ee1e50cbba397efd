"""One rank of tests/engine/test_ranks.py: `python -m tests.engine.ranks RANK FOLDER PORT...`.

The same processes make one group after the other, of 3 and then of 2 ranks, one for each port.
"""

import itertools
from typing import Any

import torch
from torch import nn

from launcher.data.plan import Plan
from launcher.runtime.process import Runtime
from tests.engine.helpers import LENGTH, Regression, Trainer, evaluation, recording
from tests.engine.test_phases import At, Game, ManyCritics
from tests.groups import serve

WORLDS = (3, 2, 1)
STEPS = 3
# (batch size, micro-batch size): 1 and 2 are fewer samples than ranks, and so is an epoch's last
# batch of 11, which has one.
CASES = [(8, 0), (8, 2), (7, 1), (11, 3), (2, 0), (1, 0)]
PHASED: dict[str, type[Game]] = {"each": Game, "many critics": ManyCritics}
PHASE_CASES = [(8, 2), (11, 0), (1, 0)]
# What ranks ask for, by (step, rank).
ASKED = {(1, 1): frozenset({"stop"}), (2, 0): frozenset({"checkpoint"})}


class Shifted(Regression):
    """Its metrics hang on a buffer, on what it draws, and on the order of the samples."""

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        values = super().eval_step(model, batch)
        shifted = values["loss"] + model.get_buffer("shift")
        return {**values, "loss": shifted, "draw": torch.rand(len(shifted))}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ramp = torch.arange(len(outputs["x"]))
        return {"order": (outputs["x"][:, 0] * ramp).sum()}


class Listed(Shifted):
    """Lists, which come in order, and what a rank draws for all."""

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        values = super().eval_step(model, batch)
        return {**values, "rows": [[float(v) for v in row] for row in values["x"]]}

    def summarize(self, outputs: Any) -> dict[str, Any]:
        first = sum(i * row[0] for i, row in enumerate(outputs["rows"]))
        return {"listed": first, "drawn": torch.rand(())}


class Folded(Listed):
    def start(self) -> list[Any]:
        return [0, 0.0]

    def merge(self, folded: list[Any], outputs: dict[str, Any]) -> list[Any]:
        for row in outputs["rows"]:
            folded = [folded[0] + 1, folded[1] * 0.9 + row[0]]  # order counts
        return [folded[0], folded[1] + torch.rand(()).item()]

    def summarize(self, outputs: list[Any]) -> dict[str, Any]:
        return {"rows": outputs[0], "folded": outputs[1]}


class Carried(Folded):
    """Two shares whatever the number of ranks; a rank may have none of them."""

    eval_shares = 2

    def eval_step(self, model: nn.Module, batch: Any, carried: Any = None) -> dict[str, Any]:
        values = super().eval_step(model, batch)
        running = values["loss"].cumsum(0) + (0.0 if carried is None else carried)
        return {**values, "loss": running, "carried": running[-1]}


KINDS: list[type[Shifted]] = [Shifted, Listed, Folded, Carried]


def evaluated(runtime: Runtime, kind: type[Shifted] = Shifted) -> dict[str, float] | None:
    """The metrics of a split over the ranks of a group. Each rank's model has a buffer of its own,
    as batch norm's are after a step."""
    task: Any = kind(weighted=True)
    task.recorder = recording(runtime)
    model = task.build_model()
    model.register_buffer("shift", torch.tensor(float(runtime.rank)))
    plan = Plan(LENGTH, 5, world_size=runtime.world_size)
    data = task.build_dataset()
    evaluate = evaluation(task, lambda ks: (data[slice(*plan.batch(k))] for k in ks), plan, runtime)
    return evaluate(model, ["val"])


def trained(runtime: Runtime, batch: int, micro: int, weighted: bool) -> dict[str, Any]:
    """Weights after some steps, the requests seen after each, and the record of all of them."""
    trainer = Trainer(Regression(weighted), runtime=runtime, batch=batch, micro=micro)
    seen, begun = [], []
    for step in range(STEPS):
        asked = ASKED.get((step, runtime.rank), frozenset())
        seen.append(sorted(trainer.one(step, asked)[1]))
        begun.append(runtime.collectives())
    return {
        **{"weights": trainer.weights, "seen": seen, "written": trainer.recorded()},
        # In the first step DDP agrees on its layout of buckets, in two more.
        "collectives": [after - before for before, after in itertools.pairwise(begun)],
    }


def phased(runtime: Runtime, kind: str, batch: int, micro: int, weighted: bool) -> dict[str, Any]:
    """The same of a task with two phases."""
    trainer = At(PHASED[kind](weighted), runtime=runtime, batch=batch, micro=micro)
    seen, begun = [], []
    for step in range(STEPS):
        asked = ASKED.get((step, runtime.rank), frozenset())
        seen.append(sorted(trainer.one(step, asked)[1]))
        begun.append(runtime.collectives())
    collectives = [after - before for before, after in itertools.pairwise(begun)]
    return {"weights": trainer.weights, "seen": seen, "collectives": collectives}


def found(runtime: Runtime) -> dict[Any, Any]:
    results: dict[Any, Any] = {
        (*case, weighted): trained(runtime, *case, weighted)
        for case in CASES
        for weighted in (False, True)
    }
    results |= {
        (kind, *case, weighted): phased(runtime, kind, *case, weighted)
        for kind, case, weighted in itertools.product(PHASED, PHASE_CASES, (False, True))
    }
    results["evaluated"] = [evaluated(runtime, kind) for kind in KINDS]
    return results


if __name__ == "__main__":
    serve(WORLDS, found)
