"""How many loader workers and compute threads a rank takes from its CPU budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.runtime.cpu import CpuBudget


@dataclass(frozen=True)
class Workers:
    """Loader workers of a rank, the threads left for its own compute, and why."""

    count: int
    threads: int
    reason: str


def choose_workers(
    wanted: int, datasets: list[Any], budget: CpuBudget, local_ranks: int, on_cpu: bool
) -> Workers:
    """`wanted` as it is if not -1, else what the data sets need and the budget allows."""
    if wanted >= 0:
        count, why = wanted, "DATALOADER.NUM_WORKERS"
    elif all(hasattr(dataset, "batch") for dataset in datasets):
        count, why = 0, "the data sets make whole batches by themselves"
    else:
        # Where the model runs on the CPU too, it gets the other half.
        count = budget.per_rank // 2 if on_cpu else budget.per_rank - 1
        why = (
            f"{budget.usable} usable CPUs ({budget.reason}), "
            f"{local_ranks} local rank{'s' * (local_ranks > 1)}"
        )
    reason = f"{count} worker{'s' * (count != 1)} a rank: {why}"
    return Workers(count, max(1, budget.per_rank - count), reason)
