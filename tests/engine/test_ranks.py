"""Real gloo groups of 3 and 2 ranks against one process: weights, records, requests, metrics."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from launcher.data.plan import Plan
from tests.engine import test_phases
from tests.engine.helpers import ALONE, LENGTH, Regression, assert_close, by_hand
from tests.engine.ranks import (
    ASKED,
    CASES,
    KINDS,
    PHASE_CASES,
    PHASED,
    STEPS,
    WORLDS,
    evaluated,
    trained,
)
from tests.groups import spawned


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found; one start of three processes serves all tests."""
    return spawned("tests.engine.ranks", tmp_path_factory.mktemp("ranks"), WORLDS)


class Run(NamedTuple):
    """A case, and what each rank of its group found."""

    batch_size: int
    micro: int
    weighted: bool
    found: list[dict[str, Any]]


@pytest.fixture(params=itertools.product(WORLDS, CASES, (False, True)), ids=str)
def run(request: pytest.FixtureRequest, ranks: list[Any]) -> Run:
    world_size, (batch_size, micro), weighted = request.param
    key = batch_size, micro, weighted
    return Run(batch_size, micro, weighted, [rank[world_size][key] for rank in ranks[:world_size]])


def test_weights_are_those_of_one_process_with_one_large_batch(run: Run) -> None:
    expected = by_hand(Regression(run.weighted), run.batch_size, STEPS, lr=0.1, momentum=0.9)
    for rank in run.found:
        assert_close(rank["weights"], expected)
        # Between the ranks themselves there is no rounding: they hold the same bits.
        assert all(map(torch.equal, rank["weights"], run.found[0]["weights"]))


def asked(ranks: int) -> list[list[str]]:
    """What so many ranks ask for, by steps."""
    said = [(step, v) for (step, rank), v in ASKED.items() if rank < ranks]
    return [sorted(set().union(*(v for s, v in said if s == k))) for k in range(STEPS)]


def test_requests_are_seen_on_all_ranks_after_the_same_step(run: Run) -> None:
    assert [rank["seen"] for rank in run.found] == [asked(len(run.found))] * len(run.found)


def test_records_are_those_of_one_process_and_rank_0_alone_writes(run: Run) -> None:
    alone = trained(ALONE, run.batch_size, 0, run.weighted)["written"]
    record, *others = (rank["written"] for rank in run.found)
    assert others == [{}] * len(others)
    assert record.keys() == alone.keys() >= {"train/loss", "train/error", "train/grad_norm"}
    assert record == pytest.approx(alone, rel=1e-5)


def test_a_step_has_one_collective_that_of_the_gradients(run: Run) -> None:
    """Stops, due saves and weights ride along; also in the steps in which a rank asks for one. Only
    a micro-batch that some ranks do not have is ended by another one."""
    plan = Plan(LENGTH, run.batch_size, False, len(run.found), run.micro)
    batches = [k % plan.steps_per_epoch for k in range(1, STEPS)]
    expected = [1 + plan.rounds(k) - plan.full_rounds(k) for k in batches]
    assert [rank["collectives"] for rank in run.found] == [expected] * len(run.found)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "case", list(itertools.product(PHASED, PHASE_CASES, (False, True))), ids=str
)
def test_phases_over_ranks_are_those_of_plain_torch(
    ranks: list[Any], world_size: int, case: tuple[str, tuple[int, int], bool]
) -> None:
    """Each exchanges its own gradients, once a step; requests go along with the first of them."""
    kind, (batch_size, micro), weighted = case
    found = [rank[world_size][kind, batch_size, micro, weighted] for rank in ranks[:world_size]]
    expected = test_phases.by_hand(PHASED[kind](weighted), batch_size, STEPS)
    plan = Plan(LENGTH, batch_size, False, world_size, micro)
    batches = [k % plan.steps_per_epoch for k in range(1, STEPS)]
    extra = [1 + plan.rounds(k) - plan.full_rounds(k) for k in batches]
    for rank in found:
        assert_close(rank["weights"], expected)
        assert all(map(torch.equal, rank["weights"], found[0]["weights"]))
        assert rank["seen"] == asked(world_size)
        # The generator's first step has the two in which DDP agrees on its layout of buckets.
        phases, layout = ((2, 2), (0, 0)) if kind == "each" else ((1, 2), (0, 2))
        assert rank["collectives"] == [
            count * each + more for count, each, more in zip(phases, extra, layout, strict=True)
        ]


@pytest.mark.parametrize("world_size", WORLDS)
def test_metrics_are_those_of_one_process_to_the_last_bit(
    ranks: list[Any], world_size: int
) -> None:
    """Also where the ranks' buffers differ: rank 0's count. And of outputs of every shape."""
    expected = [[evaluated(ALONE, kind) for kind in KINDS]] * world_size
    assert [rank[world_size]["evaluated"] for rank in ranks[:world_size]] == expected
