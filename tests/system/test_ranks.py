"""What must not depend on the number of ranks, on micro-batches or on loader workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system.jobs import (
    TASKS,
    assert_once,
    event_scalars,
    expected_scalars,
    history,
    slow,
    state,
    train,
    values,
)

# 35 samples in batches of 16: the last batch of an epoch has 3, fewer than 4 ranks.
SAMPLES, EPOCHS, BATCH = 35, 2, 16
# Some of the steps are clipped and some are not: clipping alone would hide a wrong scale.
CLIP = 4.3


@dataclass(frozen=True)
class Case:
    """How a run is split up; `ranks` None is one process without torchrun."""

    ranks: int | None = None
    micro: int = 0
    workers: int = 0
    batch: int = BATCH
    drop_last: bool = False

    @property
    def processes(self) -> int:
        return self.ranks or 1

    @property
    def alone(self) -> Case:
        """The same global batches in one process, at once."""
        return Case(batch=self.batch, drop_last=self.drop_last)

    def __str__(self) -> str:
        return (
            f"ranks={self.ranks} micro={self.micro} workers={self.workers} batch={self.batch}"
            + " drop_last" * self.drop_last
        )


class Run:
    """A run of the noting task, with the notes of its ranks."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.run, self.notes = case, folder / "run", folder / "notes"
        self.notes.mkdir(parents=True)
        settings = {
            "OUTPUT_DIR": self.run,
            "TASK.NAME": f"{TASKS}:Noted",
            "TASK.TRAIN_SAMPLES": SAMPLES,
            "TASK.VAL_SAMPLES": 21,
            "DATALOADER.NUM_WORKERS": case.workers,
            "TRAIN.BATCH_SIZE": case.batch,
            "TRAIN.MICRO_BATCH_SIZE": case.micro,
            "TRAIN.DROP_LAST": case.drop_last,
            "TRAIN.DURATION": f"{EPOCHS}ep",
            "TRAIN.GRAD_CLIP": CLIP,
            "EVAL.BATCH_SIZE": 8,  # three batches, fewer than 4 ranks
            "OPTIM.LR": 0.02,
            "LOG.EVERY": "1step",
        }
        words = [word for pair in settings.items() for word in pair]
        env = {"LAUNCHER_TEST_NOTES": str(self.notes), "OMP_NUM_THREADS": "1"}
        train(*words, ranks=case.ranks, env=env).ok()
        self.steps = [self._steps(rank) for rank in range(case.processes)]
        assert len({len(steps) for steps in self.steps}) == 1

    def read(self, name: str, rank: int) -> list[Any]:
        path = self.notes / f"{name}.rank{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _steps(self, rank: int) -> list[list[list[int]]]:
        """[step][micro-batch] -> the samples that train_step saw on a rank."""
        steps: list[list[list[int]]] = [[]]
        for note in self.read("samples", rank):
            if note == "step":
                steps.append([])
            else:
                steps[-1].append(note)
        assert steps.pop() == []
        return steps

    @property
    def batches(self) -> list[list[int]]:
        """The samples of each global batch, over all ranks and micro-batches, sorted."""
        return [
            sorted(sample for rank in ranks for micro in rank for sample in micro)
            for ranks in zip(*self.steps, strict=True)
        ]


Runs = Callable[[Case], Run]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs by case, each made once."""
    folder = tmp_path_factory.mktemp("ranks")
    return cache(lambda case: Run(case, folder / str(case)))


ONE = Case()
CASES = [
    ONE,
    Case(ranks=2, micro=3),
    Case(ranks=4, micro=2, workers=2),
    slow(Case(ranks=2, workers=2)),
    slow(Case(ranks=1, micro=5)),
    slow(Case(ranks=4)),
    *(slow(Case(ranks=r, batch=7, micro=m)) for r, m in [(None, 0), (2, 2), (4, 1)]),
    *(slow(Case(ranks=r, batch=50, micro=m)) for r, m in [(None, 0), (2, 7), (4, 6)]),
    *(slow(Case(ranks=r, batch=3)) for r in (None, 4)),
    *(slow(Case(ranks=r, batch=16, drop_last=True)) for r in (None, 4)),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_every_sample_once_an_epoch(run_of: Runs, case: Case) -> None:
    """Item 5: an epoch is every sample once, at any split into ranks, micro-batches, workers."""
    batches = run_of(case).batches
    whole, rest = divmod(SAMPLES, case.batch)
    sizes = [case.batch] * whole + [rest] * (rest > 0 and not case.drop_last)
    assert [len(batch) for batch in batches] == sizes * EPOCHS
    epochs = [batches[: len(sizes)], batches[len(sizes) :]]
    for epoch in epochs:
        seen = [sample for batch in epoch for sample in batch]
        assert len(seen) == len(set(seen))
        assert case.drop_last or set(seen) == set(range(SAMPLES))
    assert whole == 0 or epochs[0] != epochs[1], "the order must change with the epoch"


@cases
def test_one_order_of_samples(run_of: Runs, case: Case) -> None:
    """Invariant 3: which samples form a global batch depends on neither ranks, micro-batches nor
    workers."""
    assert run_of(case).batches == run_of(case.alone).batches


@cases
def test_shares_and_micro_batches(run_of: Runs, case: Case) -> None:
    """Contract, section 2: shares differ by at most one sample; no micro-batch is too large."""
    for ranks in zip(*run_of(case).steps, strict=True):
        shares = [sum(map(len, rank)) for rank in ranks]
        assert max(shares) - min(shares) <= 1
        assert case.micro == 0 or all(len(micro) <= case.micro for rank in ranks for micro in rank)
        assert case.micro > 0 or all(len(rank) <= 1 for rank in ranks)


@cases
def test_the_same_weights_as_in_one_process(run_of: Runs, case: Case) -> None:
    """Item 6: with clipping and a task's `weight`, any split makes the same update as one large
    batch, within float tolerance."""
    run, reference = run_of(case).run, run_of(case.alone).run
    mine, other = state(run), state(reference)
    assert mine["progress"] == other["progress"]
    assert set(mine["model"]) == set(other["model"])
    for name, tensor in other["model"].items():
        torch.testing.assert_close(mine["model"][name], tensor, rtol=2e-5, atol=2e-6, msg=name)
    norms = values(run, "train/grad_norm")
    assert min(norms.values()) < CLIP < max(norms.values())
    for key in ("train/loss", "train/grad_norm"):
        assert values(run, key) == pytest.approx(values(reference, key), rel=1e-4)
    # All this would also hold if nothing were ever updated.
    trained = values(run, "val/trained")
    assert trained[max(trained)] != trained[min(trained)]


@cases
def test_the_evaluation_is_that_of_one_process_to_the_last_bit(run_of: Runs, case: Case) -> None:
    """Invariant 4: every sample counts once, also with fewer batches than ranks, a `weight` and
    a `summarize`."""
    for name in ("loss", "near", "inner", "in_order", "count"):
        mine = values(run_of(case).run, f"val/{name}")
        reference = values(run_of(ONE).run, f"val/{name}")
        assert len(mine) == EPOCHS
        assert set(mine.values()) == set(reference.values())
        assert len(set(mine.values())) == 1, "the fixed net gives the same in every epoch"
    assert set(values(run_of(case).run, "val/in_order").values()) == {1.0}
    assert set(values(run_of(case).run, "val/count").values()) == {21.0}
    loaded = [n for rank in range(case.processes) for n in run_of(case).read("loaded-val", rank)]
    assert sorted(loaded) == sorted(list(range(21)) * EPOCHS)


@cases
def test_only_rank_0_writes(run_of: Runs, case: Case) -> None:
    """Contract, section 4: the other ranks write their own log files and nothing else."""
    run = run_of(case)
    for rank in range(case.processes):
        inside = {
            str(Path(path).relative_to(run.run))
            for _, path in run.read("writes", rank)
            if Path(path).is_relative_to(run.run)
        }
        if rank == 0:
            # The watch sees what there is to see, or it would prove nothing of the others.
            assert {"config.yaml", "metrics.jsonl", "history.jsonl", "logs/rank0.log"} <= inside
            assert any(path.endswith("state.pt") for path in inside)
            assert any(path.startswith("tensorboard/") for path in inside)
            assert not {f"logs/rank{other}.log" for other in range(1, 9)} & inside
        else:
            logs = {f"logs/rank{rank}.log", f"logs/rank{rank}.stderr"}
            assert inside - {".", "logs"} == logs


@cases
def test_nothing_is_written_twice(run_of: Runs, case: Case) -> None:
    """One start and one finish, one event file, each (key, step) once, whatever the ranks."""
    run = run_of(case).run
    assert len(history(run, "start")) == len(history(run, "finish")) == 1
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert_once(run)
    assert event_scalars(run) == expected_scalars(run)
    assert len(list((run / "logs").iterdir())) == case.processes
