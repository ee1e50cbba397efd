"""What one rank does alone begins no collective, by whichever of torch's ways."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from launcher.edges.alone import Alone
from launcher.errors import RunError


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one() -> torch.Tensor:
    return torch.ones(1)


COLLECTIVES: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(one()),
    "all_reduce later": lambda: dist.all_reduce(one(), async_op=True),
    "all_gather": lambda: dist.all_gather([one()], one()),
    "all_gather_object": lambda: dist.all_gather_object([None], "text"),
    "broadcast": lambda: dist.broadcast(one(), 0),
    "broadcast_object_list": lambda: dist.broadcast_object_list(["text"]),
    "gather": lambda: dist.gather(one(), [one()]),
    "reduce": lambda: dist.reduce(one(), 0),
    "scatter": lambda: dist.scatter(one(), [one()]),
    "barrier": dist.barrier,
    "monitored_barrier": dist.monitored_barrier,
    "functional": lambda: functional.all_reduce(one(), "sum", dist.group.WORLD),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_is_an_error_before_it_begins(name: str) -> None:
    refused = pytest.raises(RunError, match=r"Mine\.summarize began a collective \(.*sync_on_comp")
    with refused, Alone("Mine.summarize"):
        COLLECTIVES[name]()
    assert dist.get_world_size() == 1  # and the group is as it was
    dist.all_reduce(one())


def test_anything_else_gives_the_same_bits() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def work() -> list[torch.Tensor]:
        u, s, v = torch.linalg.svd(x)
        return [u, s, v, torch.nn.functional.softmax(x @ x.T, 1), x.double().sum(), x.sort()[0]]

    with Alone("Mine.summarize"):
        alone = work()
    assert all(torch.equal(a, b) for a, b in zip(alone, work(), strict=True))
