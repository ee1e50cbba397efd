"""Gradients of shards over real ranks: plain autograd, shard by shard, summed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.data.plan import share
from tests.groups import spawned
from tests.shards.ranks import COUNTS, SHARDS, WORLDS, Odd, samples
from tests.shards.trees import by_hand

pytestmark = pytest.mark.xdist_group("shards")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawned("tests.shards.ranks", tmp_path_factory.mktemp("ranks"), WORLDS)


def expected(count: int) -> dict[str, torch.Tensor | None]:
    model, x = Odd(), samples(count)
    by_shard: dict[str, list[torch.Tensor | None]] = {n: [] for n, _ in model.named_parameters()}
    for shard in range(SHARDS):
        start, stop = share(count, SHARDS, shard)
        for first in range(start, stop, 2):  # micro-batches of 2 samples at most
            model(x[first : min(first + 2, stop)]).backward()
        for name, p in model.named_parameters():
            by_shard[name].append(p.grad)
            p.grad = None
    return {
        name: None
        if all(g is None for g in grads)
        else by_hand([torch.zeros_like(p) if g is None else g for g in grads])
        for (name, p), grads in zip(model.named_parameters(), by_shard.values(), strict=True)
    }


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("bucket_mb", [1.0, 1e-4])
def test_gradients_are_those_of_the_tree(
    ranks: list[Any], world: int, count: int, bucket_mb: float
) -> None:
    wanted = expected(count)
    assert wanted["never"] is None
    for rank in range(world):
        answer = ranks[rank][world][f"{bucket_mb} {count}"]
        for name, grad in wanted.items():
            ours = answer["grads"][name]
            assert (ours is None) == (grad is None), name
            assert grad is None or torch.equal(ours, grad), name
        assert float(answer["carrier"][0]) == count
        assert torch.equal(answer["drawn"], ranks[0][1][f"{bucket_mb} {count}"]["drawn"])


def test_they_lie_as_the_weights_do(ranks: list[Any]) -> None:
    """Which fused optimisers go by."""
    strides = ranks[0][2]["1.0 29"]["strides"]
    model = Odd()
    assert strides["columns"] == model.columns.stride() == (1, 7)
    assert strides["images"] == model.images.stride()


def test_there_is_one_bucket_a_type_or_many(ranks: list[Any]) -> None:
    assert ranks[0][2]["1.0 29"]["buckets"] == 4  # complex, double, bfloat16; the rest
    assert ranks[0][2]["0.0001 29"]["buckets"] > 5


@pytest.mark.parametrize("world", WORLDS)
def test_sums_are_kept_from_step_to_step(ranks: list[Any], world: int) -> None:
    """As many as the tree is deep for a rank's shards: 12, 6, 4 or 3."""
    depth = {1: 4, 2: 3, 3: 3, 4: 2}[world]
    for count in COUNTS:
        assert max(ranks[0][world][f"1.0 {count}"]["kept"]) <= depth


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_that_comes_twice_is_refused(ranks: list[Any], world: int) -> None:
    """It may be on its way already; in one process it is not, but another resume would be."""
    assert ranks[0][world]["twice"] == "refused"
