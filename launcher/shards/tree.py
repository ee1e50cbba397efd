"""The one binary tree in which a step's gradients are summed, whatever the number of ranks.

Node (level, i) is the sum of shards i * 2**level up to the next node's first; (0, i) is shard i. A
node's two children are (level - 1, 2 * i) and (level - 1, 2 * i + 1). Where there are no shards for
the second one, the first stands for both, under the highest name that it has.

Ranks sum by recursive halving and doubling (Thakur, Rabenseifner and Gropp, "Optimization of
collective communication operations in MPICH", 2005): level by level two ranks that hold the two
children each send the other one half of what they hold, and keep the sum of the other half; then
the way back. A rank sends twice its gradients in all, as in a ring. Where a rank's shards are no
node of the tree it holds several, and sends more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

Node = tuple[int, int]
# [start, stop) of a vector, and the rank that holds it.
Piece = tuple[int, int, int]


def grow(nodes: list[Node], shard: int, shards: int) -> int:
    """Put a shard behind neighbouring ones that are summed as far as the tree allows; how many
    sums, each of the last two, that allows."""
    nodes.append(_highest(0, shard, shards))
    sums = 0
    while len(nodes) > 1 and nodes[-2] == (nodes[-1][0], nodes[-1][1] - 1) and nodes[-1][1] % 2:
        level, i = nodes.pop()
        nodes[-1] = _highest(level + 1, i // 2, shards)
        sums += 1
    return sums


def _highest(level: int, i: int, shards: int) -> Node:
    """A node by the highest name that it has."""
    while i and i % 2 == 0 and (i + 1) << level >= shards:
        level, i = level + 1, i // 2
    return level, i


class Meeting(NamedTuple):
    """Of one sum of two nodes a piece of the vector, of which `first` holds the left node's and
    `second` the right one's: the first keeps the sum of [start, cut), the second of [cut, stop)."""

    left: Node
    right: Node
    total: Node
    start: int
    cut: int
    stop: int
    first: int
    second: int


class Turn(NamedTuple):
    """One rank's part in a meeting. Its vectors are numbered, one for each node of its shards."""

    peer: int  # itself, where it holds both
    tag: int  # the same for both
    mine: int  # the vector that it holds of its own node,
    other: int  # of the other node, where it holds both, and
    out: int  # the one that takes the sum
    keep: slice
    give: slice


@functools.lru_cache(maxsize=256)
def meetings(shards: int, ranks: int, length: int) -> list[list[Meeting]]:
    """What ranks that have summed their own shards of a vector exchange, round by round."""
    held = dict[Node, list[Piece]]()
    for rank in range(ranks):
        held |= {node: [(0, length, rank)] for node in nodes_of(shards, ranks, rank)}
    rounds = []
    while len(held) > 1:
        lowest, found = min(level for level, _ in held), list[Meeting]()
        for level, i in sorted(node for node in held if node[0] == lowest and node[1] % 2 == 0):
            left, right, pieces = (level, i), (level, i + 1), list[Piece]()
            total = _highest(level + 1, i // 2, shards)
            for start, cut, stop, first, second in _meet(held.pop(left), held.pop(right)):
                found.append(Meeting(left, right, total, start, cut, stop, first, second))
                pieces += [(start, cut, first), (cut, stop, second)]
            held[total] = [piece for piece in pieces if piece[0] < piece[1]]
        rounds.append(found)
    return rounds


@functools.lru_cache(maxsize=256)
def turns(shards: int, ranks: int, length: int, rank: int) -> tuple[list[list[Turn]], int]:
    """What one rank does in each round of halving, and which of its vectors then holds what it has
    of the sum. Doubling is the same backwards: what was given comes back, and what was kept goes
    out, as the sum over all."""
    vectors = {node: number for number, node in enumerate(nodes_of(shards, ranks, rank))}
    rounds, out = [], 0
    for meets in meetings(shards, ranks, length):
        mine = list[Turn]()
        for tag, (left, right, total, start, cut, stop, first, second) in enumerate(meets):
            if rank not in (first, second):
                continue
            out = vectors.setdefault(total, vectors[left] if left in vectors else vectors[right])
            low, high = slice(start, cut), slice(cut, stop)
            one, other = vectors.get(left, -1), vectors.get(right, -1)
            peer = second if rank == first else first
            way = (one, other, out, low, high) if rank == first else (other, one, out, high, low)
            mine.append(Turn(peer, tag, *way))
        rounds.append(mine)
    return rounds, out


def nodes_of(shards: int, ranks: int, rank: int) -> list[Node]:
    """Those that a rank's shards are summed to."""
    nodes, each = list[Node](), shards // ranks
    for shard in range(rank * each, (rank + 1) * each):
        grow(nodes, shard, shards)
    return nodes


def _meet(left: list[Piece], right: list[Piece]) -> list[tuple[int, int, int, int, int]]:
    """Where pieces of two lists meet, and where each such place is cut: in proportion to the number
    of those that hold each list, so that all come to hold as much."""
    many = [len({rank for *_, rank in side}) for side in (left, right)]
    found, at = [], 0
    while at < left[-1][1]:
        (_, one, first), (_, other, second) = (
            next(piece for piece in side if piece[0] <= at < piece[1]) for side in (left, right)
        )
        stop = min(one, other)
        cut = stop if first == second else at + (stop - at) * many[0] // sum(many)
        found.append((at, cut, stop, first, second))
        at = stop
    return found
