"""What a model sees of an image: parts, mirrors and colours, by Pillow alone and by hand."""

import math

import numpy as np
import pytest
import torch

from launcher.datasets.augment import Augmented, Input

Image = pytest.importorskip("PIL.Image")
NONE = ([0.0] * 3, [1.0] * 3)  # mean and deviation that change nothing


def slope(width: int, height: int) -> "Image.Image":
    """Red tells where one is across, green where down, both from 0 to 1; blue is 0.4."""
    across, down = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    pixels = np.stack([across, down, np.full_like(across, 0.4)], 2)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def seen(image: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the part of a slope that an image shows, as shares."""
    across, down = image[0].mean(0), image[1].mean(1)
    # Of the outer pixels' middles: half a pixel more at each end.
    x, y = (across[-1] - across[0]) / (len(across) - 1), (down[-1] - down[0]) / (len(down) - 1)
    ends = across[0] - x / 2, across[-1] + x / 2, down[0] - y / 2, down[-1] + y / 2
    return tuple(end.item() for end in ends)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (250, 250)])
def test_an_evaluation_sees_the_middle_as_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = slope(*size)
    found = Input(64, *NONE, crop=0.8)(image)
    # By hand: the shorter side to 80, then the 64 in the middle.
    factor = 80 / min(size)
    whole = image.resize((round(size[0] * factor), round(size[1] * factor)), 2)
    left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
    pixels = np.array(whole.crop((left, top, left + 64, top + 64)))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, expected, atol=2 / 255, rtol=0)


def test_pixels_are_normalised_by_channel() -> None:
    plain = Input(8, *NONE)(slope(8, 8))
    found = Input(8, [0.1, 0.2, 0.3], [0.5, 2.0, 4.0])(slope(8, 8))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 2.0), (0.3, 4.0)]):
        torch.testing.assert_close(found[channel], (plain[channel] - mean) / std)


def test_crops_are_of_every_size_and_place_that_scale_allows() -> None:
    torch.manual_seed(0)
    width, height = 320, 240
    augment = Augmented(32, *NONE, scale=[0.1, 0.5], flip=0.0, colour=0.0)
    parts = [seen(augment(slope(width, height))) for _ in range(200)]
    areas = [(right - left) * (bottom - top) for left, right, top, bottom in parts]
    ratios = [(r - le) * width / ((b - t) * height) for le, r, t, b in parts]
    assert 0.09 < min(areas) < 0.12 and 0.46 < max(areas) < 0.52
    assert sum(areas) / 200 == pytest.approx(0.3, abs=0.02)  # uniform
    assert 0.72 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.38
    logs = [math.log(ratio) for ratio in ratios]
    assert sum(logs) / 200 == pytest.approx(0, abs=0.04)
    assert all(-0.02 < left < right < 1.02 and -0.02 < t < b < 1.02 for left, right, t, b in parts)
    places = [left / (1 - right + left) for left, right, _, _ in parts]
    assert min(places) < 0.05 and max(places) > 0.95 and 0.4 < sum(places) / 200 < 0.6


@pytest.mark.parametrize(("flip", "least", "most"), [(0.0, 0, 0), (1.0, 60, 60), (0.3, 9, 28)])
def test_mirroring_by_chance(flip: float, least: int, most: int) -> None:
    torch.manual_seed(0)
    augment = Augmented(8, *NONE, scale=[0.5, 0.5], flip=flip, colour=0.0)
    images = [augment(slope(64, 64)) for _ in range(60)]
    assert least <= sum(bool(i[0, 0, 0] > i[0, 0, -1]) for i in images) <= most
    assert all(i[1, 0, 0] < i[1, -1, 0] for i in images)  # never upside down


def test_colours_change_by_as_much_as_they_may() -> None:
    torch.manual_seed(0)
    grey = Image.new("RGB", (16, 16), (100, 100, 100))  # of which only brightness can change
    means = [
        Augmented(4, *NONE, [1.0, 1.0], 0.0, 0.25)(grey).mean().item() * 255 for _ in range(150)
    ]
    assert 74 <= min(means) < 80 and 120 < max(means) <= 126
    plain = Augmented(4, *NONE, [1.0, 1.0], 0.0, 0.0)(grey)
    assert (plain * 255).round().unique().tolist() == [100]
    # Saturation: what is red becomes more or less so, and contrast spreads a slope.
    red = Image.new("RGB", (16, 16), (200, 100, 100))
    spread = [
        (i[0] - i[1]).mean().item() / i.mean().item()
        for i in (Augmented(4, *NONE, [1.0, 1.0], 0.0, 0.5)(red) for _ in range(60))
    ]
    assert min(spread) < 0.5 < 100 / 133 < 1.0 < max(spread)
    ranges = [
        (i.max() - i.min()).item() / i.mean().item()
        for i in (Augmented(16, *NONE, [1.0, 1.0], 0.0, 0.5)(ramp()) for _ in range(60))
    ]
    assert min(ranges) < 0.6 and max(ranges) > 1.1


def ramp() -> "Image.Image":
    """Grey, from dark to bright."""
    return Image.fromarray(np.tile(np.arange(64, 192, 8, dtype=np.uint8), (16, 1))).convert("RGB")


def test_draws_follow_from_torchs_generator_alone() -> None:
    augment = Augmented(8, *NONE, [0.1, 1.0], 0.5, 0.5)
    image = slope(50, 40)
    torch.manual_seed(5)
    a, after = augment(image), torch.rand(1)
    torch.manual_seed(5)
    torch.rand(8)
    assert torch.equal(torch.rand(1), after)  # the same count for every image
    torch.manual_seed(5)
    assert torch.equal(augment(image), a) and not torch.equal(augment(image), a)


def test_an_image_of_one_pixel_and_a_thin_one() -> None:
    for size in ((1, 1), (2000, 1), (1, 300)):
        for how in (Input(4, *NONE, 0.5), Augmented(4, *NONE, [0.01, 1.0], 0.5, 0.5)):
            for _ in range(5):
                assert how(Image.new("RGB", size, (9, 9, 9))).shape == (3, 4, 4)
