"""What a task may show as a picture."""

import numpy as np
import pytest
import torch

from launcher.tasks.pictures import picture


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 5), (1, 1, 4, 5)), ((3, 4, 5), (1, 3, 4, 5)), ((2, 1, 4, 5), (2, 1, 4, 5))],
)
def test_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert picture(np.zeros(shape, np.uint8)).shape == expected
    assert picture(torch.zeros(shape, dtype=torch.bfloat16)).dtype == torch.float32
    assert picture(torch.ones(shape, dtype=torch.bool)).max() == 255
    assert picture(torch.full(shape, torch.nan)).max() == 0


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 1, 1), (2, 4, 5), (0, 3, 4, 5)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="an image has the shape"):
        picture(torch.zeros(shape))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="an image is uint8"):
        picture(torch.zeros(4, 5).int())
