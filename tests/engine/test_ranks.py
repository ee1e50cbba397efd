"""Real gloo groups of 3 and 2 ranks against one process: weights, records, requests, metrics."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.helpers import ALONE, Regression, assert_close, by_hand
from tests.engine.ranks import ASKED, CASES, STEPS, WORLDS, evaluated, trained

cases = pytest.mark.parametrize("case", CASES, ids=str)
worlds = pytest.mark.parametrize("world_size", WORLDS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found; one start of three processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
        ports = [str(s.getsockname()[1]) for s in (a, b)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.ranks", str(rank), str(folder), *ports],
            cwd=Path(__file__).parents[2],
        )
        for rank in range(max(WORLDS))
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(max(WORLDS))]


def found_by(rank: Any, world_size: int, case: tuple[int, int], weighted: bool) -> dict[str, Any]:
    key = (*case, weighted)
    return rank[world_size][key]


@worlds
@cases
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_are_those_of_one_process_with_one_large_batch(
    ranks: list[Any], world_size: int, case: tuple[int, int], weighted: bool
) -> None:
    expected = by_hand(Regression(weighted), case[0], STEPS, lr=0.1, momentum=0.9)
    found = [found_by(rank, world_size, case, weighted)["weights"] for rank in ranks[:world_size]]
    for weights in found:
        assert_close(weights, expected)
        # Between the ranks themselves there is no rounding: they hold the same bits.
        assert all(map(torch.equal, weights, found[0]))


@worlds
@cases
@pytest.mark.parametrize("weighted", [False, True])
def test_requests_are_seen_on_all_ranks_after_the_same_step(
    ranks: list[Any], world_size: int, case: tuple[int, int], weighted: bool
) -> None:
    asked = [sorted(set().union(*(v for (s, _), v in ASKED.items() if s == k))) for k in range(3)]
    for rank in ranks[:world_size]:
        assert found_by(rank, world_size, case, weighted)["seen"] == asked


@worlds
@cases
@pytest.mark.parametrize("weighted", [False, True])
def test_records_are_those_of_one_process_and_rank_0_alone_writes(
    ranks: list[Any], world_size: int, case: tuple[int, int], weighted: bool
) -> None:
    alone = trained(ALONE, case[0], 0, weighted)["written"]
    record, *others = (
        found_by(rank, world_size, case, weighted)["written"] for rank in ranks[:world_size]
    )
    assert others == [{}] * (world_size - 1)
    assert record.keys() == alone.keys() >= {"train/loss", "train/error", "train/grad_norm"}
    for key in record:
        assert record[key] == pytest.approx(alone[key], rel=1e-5)


@worlds
def test_metrics_are_those_of_one_process_to_the_last_bit(
    ranks: list[Any], world_size: int
) -> None:
    """Also where the ranks' buffers differ: rank 0's count."""
    for rank in ranks[:world_size]:
        assert rank[world_size]["evaluated"] == evaluated(ALONE)


@worlds
@cases
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_has_one_collective_that_of_the_gradients(
    ranks: list[Any], world_size: int, case: tuple[int, int], weighted: bool
) -> None:
    """Stops, due saves and weights ride along; also in the steps in which a rank asks for one."""
    found = [found_by(rank, world_size, case, weighted) for rank in ranks[:world_size]]
    assert [one["collectives"] for one in found] == [[1] * (STEPS - 1)] * world_size
