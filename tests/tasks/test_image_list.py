"""The image-list task: folders or lists, augmented in training alone, mistakes that are named."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher.config import load_config
from launcher.errors import UsageError
from launcher.tasks import resolve_task
from launcher.tasks.image_list import ImageList
from launcher.tasks.resnet import resnet

Image = pytest.importorskip("PIL.Image")
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", colour)
    return tmp_path


def task(folder: Path, *words: str) -> ImageList:
    given = (
        "TASK.NAME",
        "image-list",
        "TASK.TRAIN",
        f"{folder}/train",
        "TASK.VAL",
        f"{folder}/val",
    )
    small = ("TASK.SIZE", "8", "TASK.WIDTH", "8", "TASK.BLOCKS", "[1, 1]")
    return ImageList(load_config(None, [*given, *small, *words], resolve_task).cfg)


def test_folders_are_classes_by_name(images: Path) -> None:
    made = task(images, "TASK.MEAN", "[0, 0, 0]", "TASK.STD", "[1, 1, 1]")
    train, val = made.build_dataset("train"), made.build_dataset("val")
    assert (len(train), len(val)) == (12, 6)
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2] and train.names == [*COLOURS]
    for image, label in val:
        assert image.shape == (3, 8, 8)
        assert (image * 255).round()[:, 4, 4].tolist() == list([*COLOURS.values()][label])
    assert made.build_model()(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_val_without_a_class_keeps_the_numbers_of_train(images: Path) -> None:
    for path in (images / "val" / "blue").iterdir():
        path.unlink()
    (images / "val" / "blue").rmdir()
    assert task(images).build_dataset("val").labels.tolist() == [1, 1, 2, 2]


def test_lists_and_variables(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "a.txt").write_text("train/red/0.png 0\ntrain/blue/1.png 7\n")
    (images / "b.txt").write_text("val/red/0.png 7\n")
    monkeypatch.setenv("IMAGES", str(images))
    made = task(images, "TASK.TRAIN", "$IMAGES/a.txt", "TASK.VAL", "$IMAGES/b.txt")
    assert made.build_dataset("val").labels.tolist() == [7]
    assert made.build_model()[-1].out_features == 8


@pytest.mark.parametrize(
    ("words", "split", "said"),
    [
        (
            {"VAL": "more"},
            "val",
            r"more/zebra: 'zebra' is none of the 3 classes .*\(blue, green, re",
        ),
        (
            {"TRAIN": "a.txt", "VAL": "b.txt"},
            "val",
            r"b\.txt:3: class 2 is none .* TASK\.TRAIN \(.*a",
        ),
        ({"TRAIN": "c.txt"}, "train", r"c\.txt:1: class -1 is below 0"),
        ({"VAL": "b.txt"}, "val", r"both folders, or both list files"),
        ({"VAL": "gone"}, "val", r"TASK\.VAL: there is no file or folder .*/gone$"),
        ({"TRAIN": "gone"}, "train", r"TASK\.TRAIN: there is no file or folder .*/gone$"),
        ({"TRAIN": ""}, "train", r"TASK\.TRAIN names no images: a folder"),
        ({"VAL": ""}, "val", r"TASK\.VAL names no images"),
        ({"TRAIN": "$NOBODYS/train"}, "train", r"TASK\.TRAIN: .* no variable NOBODYS"),
        ({}, "test", r"the splits train and val, not 'test'"),
    ],
)
def test_mistakes_in_the_data_are_named(
    images: Path, words: dict[str, str], split: str, said: str
) -> None:
    save(images / "more" / "zebra" / "a.png", (0, 0, 0))
    (images / "a.txt").write_text("x.png 0\nx.png 3\n")
    (images / "b.txt").write_text("x.png 0\n\nx.png 2\n")
    (images / "c.txt").write_text("x.png -1\n")
    given = [
        word
        for key, value in words.items()
        for word in (
            f"TASK.{key}",
            f"{images}/{value}" if value.isidentifier() or "." in value else value,
        )
    ]
    with pytest.raises(UsageError, match=said):
        task(images, *given).build_dataset(split)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SIZE=0", r"TASK\.SIZE must be at least 1, not 0"),
        ("SCALE=[0.5]", r"TASK\.SCALE is \[least, most\], up to 1, not \[0\.5\]"),
        ("SCALE=[0.9,0.5]", r"TASK\.SCALE"),
        ("FLIP=1.5", r"TASK\.FLIP is from 0 to 1, not 1\.5"),
        ("COLOUR=-1", r"TASK\.COLOUR"),
        ("CROP=0", r"TASK\.CROP"),
        ("MEAN=[0,0]", r"TASK\.MEAN has 3"),
        ("STD=[1,0,1]", r"TASK\.STD has 3 numbers above 0"),
        ("WIDTH=12", r"TASK\.WIDTH must be a multiple of 8, not 12"),
        ("BLOCKS=[]", r"TASK\.BLOCKS"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        task(tmp_path, f"TASK.{words}")


@pytest.mark.parametrize(
    ("key", "value", "split", "says"),
    [
        ("SIZE", "9", "val", lambda a, b: b.shape == (3, 9, 9)),
        ("CROP", "0.5", "val", lambda a, b: not torch.equal(a, b)),
        ("CROP", "0.5", "train", torch.equal),
        ("MEAN", "[0.9, 0.9, 0.9]", "val", lambda a, b: (b < a).all()),
        ("STD", "[9, 9, 9]", "train", lambda a, b: b.std() < a.std()),
        ("SCALE", "[1, 1]", "train", lambda a, b: not torch.equal(a, b)),
        ("FLIP", "1", "train", lambda a, b: torch.equal(a.flip(2), b)),
        ("COLOUR", "0.4", "train", lambda a, b: not torch.equal(a, b)),
        ("COLOUR", "0.4", "val", torch.equal),
    ],
)
def test_what_the_model_sees_follows_the_keys(
    tmp_path: Path, key: str, value: str, split: str, says: object
) -> None:
    for folder in ("train", "val"):
        (tmp_path / folder / "a").mkdir(parents=True)
        noise = torch.randint(256, (20, 30, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / folder / "a" / "0.png")
    plain = ("TASK.FLIP", "0", "TASK.COLOUR", "0", "TASK.SCALE", "[0.3, 0.3]")

    def image(*words: str) -> torch.Tensor:
        torch.manual_seed(0)
        return task(tmp_path, *plain, *words).build_dataset(split)[0][0]

    assert says(image(), image(f"TASK.{key}={value}"))


def test_the_steps_agree_and_a_batch_changes_no_sample(images: Path) -> None:
    made = task(images)
    torch.manual_seed(0)
    model, batch = made.build_model(), (torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 2, 1]))
    trained, tested = made.train_step(model, batch), made.eval_step(model, batch)
    assert sorted(tested) == sorted(made.metrics())
    for name in tested:
        torch.testing.assert_close(tested[name].float().mean(), trained[name])
    torch.testing.assert_close(model(batch[0][:2]), model(batch[0])[:2])


def test_the_network_is_resnet_18() -> None:
    """Its parameters and multiplications are the paper's: 11.7 million, 1.8 billion."""
    with torch.device("meta"):
        model, image = resnet(1000, 64, [2, 2, 2, 2], 224), torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2 == pytest.approx(1.814e9, rel=1e-3)
    # Small images keep their resolution at first; keys count.
    with torch.device("meta"):
        small = resnet(7, 16, [1, 2], 32)
        features = small[:-3](torch.empty(2, 3, 32, 32))
    assert features.shape == (2, 32, 16, 16) and len([m for m in small if hasattr(m, "path")]) == 3
