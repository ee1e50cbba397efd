"""Histograms: the counts that were put in come out."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.tasks.pictures import BUCKETS, spread
from launcher.telemetry.media import OnHost

numbers = st.lists(
    st.floats(-1e6, 1e6, width=32) | st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(numbers)
@example([0.0, 1.4e-45])
@example([3.0, 3.0, float("nan")])
def test_every_finite_value_is_in_its_bucket(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    low, high, total, squares, *counts = spread(tensor).tolist()
    finite = tensor[torch.isfinite(tensor)].double().numpy()
    assert len(counts) == BUCKETS and sum(counts) == len(finite)
    if len(finite) == 0:
        assert (low, high, total) == (float("inf"), -float("inf"), 0)
        return
    assert (low, high) == (finite.min(), finite.max())
    assert total == pytest.approx(finite.sum(), abs=1e-6)
    assert squares == pytest.approx((finite**2).sum())
    edges = np.linspace(low, high, BUCKETS + 1)
    slack = 1e-12 * (high - low)  # a value on an edge may lie beside it
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        inside = ((finite > start + slack) & (finite < stop - slack)).sum()
        around = ((finite >= start - slack) & (finite <= stop + slack)).sum()
        assert inside <= count <= around or low == high


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    found = spread(torch.tensor([0, 1, 1, 1]).to(dtype))
    assert found[4] == 1 and found[-1] == 3


def test_what_changes_later_does_not_change_what_was_taken() -> None:
    tensor = torch.ones(3)
    taken = OnHost(tensor)
    tensor.zero_()
    assert taken.read().tolist() == [1, 1, 1]
