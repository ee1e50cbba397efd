"""Pictures and histograms: the pixels and counts that were put in come out."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.telemetry.media import BUCKETS, OnHost, buckets, picture, png, spread


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_what_an_image_library_reads(channels: int) -> None:
    image_library = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    read = np.asarray(image_library.open(io.BytesIO(png(pixels))))
    assert np.array_equal(read.reshape(5, 7, channels), pixels.transpose(1, 2, 0))


def test_png_of_fractions() -> None:
    image_library = pytest.importorskip("PIL.Image")
    values = np.array([[[0.0, 0.5, 1.0, -3.0, 7.0, np.nan, np.inf]]], dtype=np.float32)
    read = np.asarray(image_library.open(io.BytesIO(png(values))))
    assert read.tolist() == [[0, 128, 255, 0, 255, 0, 255]]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 5), (1, 1, 4, 5)), ((3, 4, 5), (1, 3, 4, 5)), ((2, 1, 4, 5), (2, 1, 4, 5))],
)
def test_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert picture(np.zeros(shape, np.uint8)).shape == expected
    assert picture(torch.zeros(shape, dtype=torch.bfloat16)).dtype == torch.float32
    assert picture(torch.ones(shape, dtype=torch.bool)).max() == 255


@pytest.mark.parametrize(
    "image",
    [torch.zeros(5), torch.zeros(2, 4, 5), torch.zeros(0, 3, 4, 5), torch.zeros(4, 5).int()],
)
def test_what_is_no_image_is_refused(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an image"):
        picture(image)


numbers = st.lists(
    st.floats(-1e6, 1e6, width=32) | st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(numbers)
def test_every_finite_value_is_in_its_bucket(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    rows = buckets(spread(tensor).numpy())
    finite = tensor[torch.isfinite(tensor)].double().numpy()
    if len(finite) == 0:
        assert rows is None
        return
    assert rows is not None
    assert rows[:, 2].sum() == len(finite)
    if finite.min() == finite.max():
        assert rows.shape == (1, 3) and rows[0, 0] < finite[0] < rows[0, 1]
        return
    assert (rows[0, 0], rows[-1, 1], len(rows)) == (finite.min(), finite.max(), BUCKETS)
    # Edges are rounded to single precision on the device: a value on one may lie beside it.
    slack = 1e-5 * (finite.max() - finite.min()) + 1e-6 * np.abs(finite).max()
    for start, stop, count in rows:
        inside = ((finite > start + slack) & (finite < stop - slack)).sum()
        around = ((finite >= start - slack) & (finite <= stop + slack)).sum()
        assert inside <= count <= around


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    rows = buckets(spread(torch.tensor([0, 1, 1, 1]).to(dtype)).numpy())
    assert rows is not None and rows[0, 2] == 1 and rows[-1, 2] == 3


def test_what_changes_later_does_not_change_what_was_taken() -> None:
    tensor = torch.ones(3)
    taken = OnHost(tensor)
    tensor.zero_()
    assert taken.read().tolist() == [1, 1, 1]
