"""Sums over shards against their definition, ranks simulated in this process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.shards.exchange import summing
from launcher.shards.tree import grow, nodes_of, turns
from tests.shards.trees import by_hand


def own_sums(leaves: list[torch.Tensor], first: int, last: int) -> tuple[list[torch.Tensor], int]:
    """What a rank has of its shards, and the most vectors that it held on the way."""
    nodes: list[Any] = []
    sums: list[torch.Tensor] = []
    most = 0
    for shard in range(first, last):
        made = grow(nodes, shard, len(leaves))
        sums.append(leaves[shard].clone())
        most = max(most, len(sums))
        for _ in range(made):
            right = sums.pop()
            sums[-1] += right
    assert len(nodes) == len(sums)
    return sums, most


def over_ranks(leaves: list[torch.Tensor], ranks: int) -> tuple[list[torch.Tensor], list[int]]:
    """Each rank's sum over all, and how many elements it has sent."""
    shards, length, each = len(leaves), len(leaves[0]), len(leaves) // ranks
    vectors = [own_sums(leaves, r * each, (r + 1) * each)[0] for r in range(ranks)]
    going = [summing(shards, ranks, r, vectors[r]) for r in range(ranks)]
    sent = [0] * ranks
    while (swaps := [next(one, None) for one in going])[0] is not None:
        under_way = {}
        for rank, (out, _) in enumerate(swaps):
            for peer, tag, tensor in out:
                assert (rank, peer, tag) not in under_way
                under_way[rank, peer, tag] = tensor.clone()
                sent[rank] += len(tensor)
        for rank, (_, into) in enumerate(swaps):
            for peer, tag, tensor in into:
                tensor.copy_(under_way.pop((peer, rank, tag)))
        assert not under_way
    assert not any(swaps)
    return [vectors[r][turns(shards, ranks, length, r)[1]] for r in range(ranks)], sent


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=200, deadline=None)
@given(
    shards=st.integers(1, 40),
    part=st.integers(0, 10),
    length=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_every_rank_has_the_sum_of_the_tree(
    shards: int, part: int, length: int, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-3, 4, (shards, 1), generator=draw)
    leaves = list((torch.randn(shards, length, generator=draw) * scale).to(dtype))
    divisors = [n for n in range(1, shards + 1) if shards % n == 0]
    ranks = divisors[part % len(divisors)]
    expected = by_hand(leaves)
    for found in over_ranks(leaves, ranks)[0]:
        assert torch.equal(found, expected)


def test_another_order_gives_other_bits() -> None:
    """So the test above can fail."""
    leaves = list(torch.randn(8, 100, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(by_hand(leaves), torch.stack(leaves).sum(0))
    assert not torch.equal(by_hand(leaves), by_hand(leaves[::2] + leaves[1::2]))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("each", [1, 2, 4])
def test_a_rank_sends_what_it_would_in_a_ring(ranks: int, each: int) -> None:
    length = 1600
    _, sent = over_ranks([torch.ones(length)] * (ranks * each), ranks)
    assert sent == [2 * length * (ranks - 1) // ranks] * ranks


@pytest.mark.parametrize("shards", range(1, 40))
def test_a_rank_holds_as_many_sums_as_the_tree_is_deep(shards: int) -> None:
    depth = math.ceil(math.log2(shards)) + 1
    assert own_sums([torch.ones(1)] * shards, 0, shards)[1] <= depth


@pytest.mark.parametrize(("shards", "ranks"), [(12, 3), (12, 6), (24, 12), (6, 3), (5, 5), (16, 2)])
def test_a_rank_whose_shards_are_a_node_holds_that(shards: int, ranks: int) -> None:
    assert all(len(nodes_of(shards, ranks, rank)) == 1 for rank in range(ranks))
