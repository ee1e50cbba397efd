"""A task's gather on real gloo groups of 3 and 2 ranks, against one process that has all rows."""

import copy
import multiprocessing
import pickle
import sys
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch

from launcher import Task
from launcher.errors import RunError
from launcher.runtime.gather import Gather
from launcher.tasks.task import make_task
from tests.engine.helpers import ALONE, assert_close
from tests.groups import spawned
from tests.runtime.gathering import (
    CASES,
    DTYPES,
    LOSSES,
    PARTS,
    VALUES,
    WORLDS,
    contrast_by_hand,
    interdependent,
    rows,
    value_of,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found; one start of three processes serves all tests."""
    return spawned("tests.runtime.gathering", tmp_path_factory.mktemp("gather"), WORLDS)


@pytest.fixture(params=WORLDS, ids="{} ranks".format)
def found(request: pytest.FixtureRequest, ranks: list[Any]) -> list[Any]:
    return [rank[request.param] for rank in ranks[: request.param]]


def by_hand(loss: Any, parts: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Each rank's loss, and the gradient of all of them by its rows, from one process.

    All ranks' losses are worked out again for each gather, until it is known what each rank gives.
    """
    mine = [rows(rank, n, 3).requires_grad_() for rank, n in enumerate(parts)]
    known: list[torch.Tensor] = []

    def gather(given: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        at = len(given) - 1
        return known[at] if at < len(known) else x.new_zeros((sum(parts), *x.shape[1:]))

    while True:
        given: list[list[torch.Tensor]] = [[] for _ in mine]
        losses = [loss(r, x, partial(gather, given[r])) for r, x in enumerate(mine)]
        if len(known) == len(given[0]):
            break
        known.append(torch.cat([of[len(known)] for of in given]))
    total = torch.stack(losses).sum() + sum(0.0 * x.sum() for x in mine)
    return [
        [loss.detach(), gradient]
        for loss, gradient in zip(losses, torch.autograd.grad(total, mine), strict=True)
    ]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(
    found: list[Any], name: str, parts: tuple[int, ...]
) -> None:
    """Also of rows that a rank's own loss does not use, and where a rank has none."""
    expected = by_hand(LOSSES[name], parts[: len(found)])
    assert_close(
        [t for rank in found for t in rank[parts, name]], list(chain(*expected)), 1e-12, 1e-12
    )


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_in_rank_order_bit_for_bit(
    found: list[Any], dtype: str, parts: tuple[int, ...]
) -> None:
    whole = torch.cat([3 * rows(rank, parts[rank], 2, 2) for rank in range(len(found))])
    whole = whole.to(getattr(torch, dtype))
    for rank in found:
        assert rank[parts, dtype].dtype == whole.dtype and torch.equal(rank[parts, dtype], whole)
        assert torch.equal(rank[parts, dtype, "flat"], whole[:, 0, 0])
        assert rank["no numbers"].shape == (2 * len(found), 0)


def test_gradients_in_half_precision_are_rounded_once(found: list[Any]) -> None:
    n = len(found)
    parts = [rows(rank, 4 * n, 3, seed=1).half().float() for rank in range(n)]
    expected = torch.stack(parts).sum(0).half().split(4)
    assert all(torch.equal(rank["half"], e) for rank, e in zip(found, expected, strict=True))


def test_idle_ranks_take_part_without_knowing_in_how_many(found: list[Any]) -> None:
    """Also where the run's first gather is one of them."""
    for when in ("served first", "served"):
        assert_close(found[0][when], by_hand(interdependent, (3,))[0], 1e-12, 1e-12)


def test_what_does_not_fit_is_told_on_every_rank(found: list[Any]) -> None:
    assert all(rank["refused"] == found[0]["refused"] for rank in found)
    others = [0, 2][: len(found) - 1]
    told = found[0]["refused"]
    assert all(words.startswith("Task.gather") for words in told.values())
    assert f"ranks {others}: gathers rows of float32, each of shape ()" in told["dtype"]
    assert "ranks [1]: gathers rows of float64" in told["dtype"]
    assert "ranks [0]: gathers rows of float32, each of shape (4,)" in told["shape"]
    assert "ranks [1]: gathers rows of float32, each of shape (3,), without" in told["no_grad"]
    assert "ranks [1]: has ended its micro-batch" in told["over"]


def test_a_gather_counts_in_the_measure_of_who_lags(found: list[Any]) -> None:
    """Four headers."""
    assert [rank["counted"] for rank in found] == [(4, 4)] * len(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_one_process_that_sees_all_parts(
    found: list[Any], case: tuple[int, int]
) -> None:
    """Where ranks have fewer micro-batches than others, and in a last batch of 2 or 1 samples."""
    expected = contrast_by_hand(len(found), *case)
    for rank in found:
        assert_close(rank[case], expected)
        assert all(map(torch.equal, rank[case], found[0][case]))


def test_a_collective_of_the_tasks_own_is_refused_still(found: list[Any]) -> None:
    for rank in found:
        assert "Own.train_step begins a collective of its own" in rank["own"]


class Mine(Task):
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_one_process_gets_its_own_rows_and_a_tasks_own_method_stays() -> None:
    x, gather, cfg = torch.ones(2, requires_grad=True), Gather(ALONE), Any
    plain: Any = type("Plain", (), {"__init__": lambda self, cfg: None})
    tasks = [make_task(kind, cfg, Task.recorder, gather=gather) for kind in (Task, plain)]  # type: ignore[arg-type]
    assert all(task.gather(x) is x and task.gather is gather for task in tasks)
    assert Task(cfg).gather(x) is x  # type: ignore[arg-type]
    assert make_task(Mine, cfg, Task.recorder, gather=gather).gather(x)[0] == 2  # type: ignore[arg-type]


def test_what_cannot_be_gathered_is_refused_in_one_process_too() -> None:
    gather = Gather(ALONE)
    for value in (torch.tensor(1.0), [1.0], torch.eye(2).to_sparse(), torch.ones(1, device="meta")):
        with pytest.raises(RunError, match=r"Task.gather was called with a .* dense rows"):
            gather(value)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="in an evaluation"):
        Gather(ALONE, lambda: True)(torch.ones(1))


def gathers(gather: Any) -> None:
    try:
        gather(torch.ones(1))
    except RunError as error:
        sys.exit(int("in another process" in str(error)))


def test_no_other_process_gathers() -> None:
    """A loader worker, forked or spawned with the task."""
    gather = Gather(ALONE)
    worker = multiprocessing.get_context("fork").Process(target=gathers, args=[gather])
    worker.start()
    worker.join()
    assert worker.exitcode == 1
    for sent in (pickle.loads(pickle.dumps(gather)), copy.deepcopy(gather)):
        with pytest.raises(RunError, match="in another process"):
            sent(torch.ones(1))


def test_values_of_any_size_reach_rank_0_by_one_collective(found: list[Any]) -> None:
    """That of 4 KiB; what rank 0 receives besides counts for none, or a hang would blame others."""
    for i, case in enumerate(VALUES):
        (ours, count), *others = (rank["values"][i] for rank in found)
        assert ours == [value_of(case, rank) for rank in range(len(found))]
        assert [count, *(n for _, n in others)] == [1] * len(found)
        assert all(given is None for given, _ in others)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_do_not_use_what_they_gather_take_part_in_its_gradients(
    found: list[Any], case: tuple[int, int]
) -> None:
    """They would wait for each other for ever."""
    for rank in found:
        assert_close(*rank["some use", case])
