"""ListFile and ImageFolder: labelled images, and mistakes told with their line or folder."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from launcher.datasets import ImageFolder, ListFile
from launcher.errors import RunError, UsageError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, colour: object, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), colour).save(path)
    return path


def listed(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_spaces_absolute_paths_comments_and_windows_lines(tmp_path: Path) -> None:
    save(tmp_path / "a cat.png", (255, 0, 0))
    save(tmp_path / "dogs and more" / "dög 1.png", (0, 255, 0))
    far = save(tmp_path / "elsewhere" / "b.png", 51, mode="L")
    text = f"\ufeff# a list\r\na cat.png 3\r\n\n  dogs and more/dög 1.png\t 0\n{far} -1"
    dataset = ListFile(listed(tmp_path, text))
    assert len(dataset) == 3 and dataset.classes == 4
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [3, 0, -1]
    image, label = dataset[0]
    assert image.shape == (3, 3, 4) and image.dtype == torch.float32 and label == 3
    assert image[:, 0, 0].tolist() == [1, 0, 0]
    assert dataset[1][0][:, 2, 3].tolist() == [0, 1, 0]
    # A grey image becomes RGB, so that all can stand in one batch.
    assert dataset[2][0][:, 0, 0].tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(IndexError):
        dataset[3]


def test_relative_paths_start_at_root(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", 0)
    path = listed(tmp_path, "a.png 1\n")
    assert ListFile(path, root=tmp_path / "images")[0][1] == 1
    with pytest.raises(RunError, match=r"train\.txt:1: .* a\.png: No such file"):
        ListFile(path)[0]


def test_transform_and_mode(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (10, 20, 30))
    path = listed(tmp_path, "a.png 1\n")
    assert ListFile(path, transform=lambda image: image.getpixel((0, 0)))[0] == ((10, 20, 30), 1)
    assert ListFile(path, mode="L")[0][0].shape == (1, 3, 4)
    with pytest.raises(UsageError, match="'F' need a transform"):
        ListFile(path, mode="F")
    with pytest.raises(UsageError, match="no image mode 'RGBX1'"):
        ListFile(path, mode="RGBX1")


@pytest.mark.parametrize(
    "text, said",
    [
        ("a.png 1\n\nb c.png one\n", r"train\.txt:3: the label 'one'.*no integer"),
        ("a.png 1\nb.png\n", r"train\.txt:2: expected `path label`, found 'b.png'"),
        ("a.png 1_0\n", r"train\.txt:1: the label '1_0'"),
        ("a.png 1.0\n", r"train\.txt:1: the label '1.0'"),
        (f"a.png {10**20}\n", r"train\.txt:1: the label"),
        (b"# x\na\xff.png 1\n", r"train\.txt:2: is not UTF-8"),
        ("# nothing\n\n", r"train\.txt names no samples"),
    ],
)
def test_mistakes_in_the_list_name_the_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ListFile(listed(tmp_path, text))


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt: No such file"):
        ListFile(tmp_path / "none.txt")


def test_a_missing_pillow_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install 'launcher\[examples\]'"):
        ListFile(listed(tmp_path, "a.png 1\n"))


@pytest.fixture
def damaged(tmp_path: Path) -> ListFile:
    """Good, missing, empty, cut off, no image, good."""
    save(tmp_path / "a.png", 0)
    whole = save(tmp_path / "whole.jpg", 0).read_bytes()
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut off.jpg").write_bytes(whole[:-40])
    (tmp_path / "text.png").write_text("no image")
    text = "a.png 0\n# here it begins\nno such.png 1\nempty.png 2\ncut off.jpg 3\ntext.png 4\n"
    return ListFile(listed(tmp_path, text + "a.png 5\n"))


@pytest.mark.parametrize(
    "index, said",
    [
        (1, r":3: cannot read the image no such.png: No such file"),
        (2, r":4: cannot read the image empty.png: cannot identify"),
        (3, r":5: cannot read the image cut off.jpg: "),
        (4, r":6: cannot read the image text.png: cannot identify"),
    ],
)
def test_a_bad_image_names_list_line_and_path(damaged: ListFile, index: int, said: str) -> None:
    with pytest.raises(RunError, match=f"sample {index} of data set ListFile .*train.txt{said}"):
        Fetcher(damaged, None, seed=0)[Request(0, [0, index])]


def test_bad_images_are_skipped_and_counted(
    damaged: ListFile, caplog: pytest.LogCaptureFixture
) -> None:
    fetcher = Fetcher(damaged, None, seed=0, skip_bad=True)
    with caplog.at_level(logging.WARNING):
        images, labels = fetcher[Request(0, [0, 1, 4])]
    assert images.shape == (3, 3, 3, 4) and labels.tolist() == [0, 5, 5]
    assert fetcher.skipped == 2
    assert "train.txt:3: cannot read the image no such.png" in caplog.text
    assert "2 so far" in caplog.text


def test_a_worker_names_the_line_too(damaged: ListFile) -> None:
    batches = load(Fetcher(damaged, None, 0), [Request(0, [1])], 1, 2, False, 60)
    with pytest.raises(RunError, match=r"train\.txt:3: cannot read the image no such\.png"):
        next(batches)


def test_a_long_list_is_kept_as_three_blocks(tmp_path: Path) -> None:
    lines = [f"folder {i % 100}/image {i}.jpg {i % 1000}" for i in range(20_000)]
    dataset = ListFile(listed(tmp_path, "\n".join(lines)))
    assert dataset.labels[[0, 1_234, -1]].tolist() == [0, 234, 999] and dataset.classes == 1000
    size = len(pickle.dumps(dataset))
    assert size < (tmp_path / "train.txt").stat().st_size + 17 * len(lines)
    with pytest.raises(RunError, match=r"train\.txt:12346: .* folder 45/image 12345\.jpg"):
        pickle.loads(pickle.dumps(dataset))[12_345]


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "more" / "2 b.JPG", (0, 255, 0))
    save(tmp_path / "dog" / "#1.png", (255, 0, 0))
    far = save(tmp_path / "elsewhere.png", (0, 0, 255))
    save(tmp_path / "cät" / "3 4.png", 51, mode="L")
    (tmp_path / "dog" / "0.png").symlink_to(far)
    for left_out in (".hidden/a.png", "dog/.a.png", "dog/.more/a.png"):
        save(tmp_path / left_out, 0)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    dataset = ImageFolder(tmp_path)
    assert dataset.names == ["cät", "dog"] and dataset.classes == 2
    assert dataset.labels.tolist() == [0, 1, 1, 1]
    images = [image[:, 0, 0].tolist() for image, _ in (dataset[i] for i in range(4))]
    assert images[0] == pytest.approx([0.2] * 3)
    assert images[1:3] == [[1, 0, 0], [0, 0, 1]] and dataset[3][1] == 1  # "#" is before "0"
    assert pickle.loads(pickle.dumps(dataset))[0][1] == 0
    named = ImageFolder(tmp_path, ["ant", "dog", "bee", "cät"], transform=lambda image: image.size)
    assert named.labels.tolist() == [3, 1, 1, 1] and named.classes == 4
    assert named[2] == ((4, 3), 1)


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    save(tmp_path / "all" / "cat" / "a.png", 0)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    assert len(ImageFolder(tmp_path / "some")) == 1


def test_mistakes_in_folders_name_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none: No such file"):
        ImageFolder(tmp_path / "none")
    save(tmp_path / "flat" / "a.png", 0)
    with pytest.raises(UsageError, match=r"flat has no class folders: images lie in one folder a"):
        ImageFolder(tmp_path / "flat")
    save(tmp_path / "a" / "cat" / "a.png", 0)
    (tmp_path / "a" / "dog").mkdir()
    with pytest.raises(UsageError, match=r"a/dog has no images \(files that end in \.bmp, "):
        ImageFolder(tmp_path / "a")
    save(tmp_path / "a" / "dog" / "a.png", 0)
    with pytest.raises(UsageError, match=r"a/dog: 'dog' is none of the 2 classes .*\(cat, cow\)"):
        ImageFolder(tmp_path / "a", ["cat", "cow"])
    save(tmp_path / "a" / "dog" / "two\nlines.png", 0)
    with pytest.raises(UsageError, match=r"rename 'dog/two\\nlines\.png'"):
        ImageFolder(tmp_path / "a")


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "cat" / "a.png", 0)
    (tmp_path / "cat" / "closed").mkdir()
    scandir = os.scandir  # root may read all: so it is refused by hand

    def refused(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UsageError, match=r"cat/closed: Permission denied"):
        ImageFolder(tmp_path)


def test_a_bad_image_in_a_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", 0)
    (tmp_path / "cat" / "b.png").write_text("no image")
    with pytest.raises(RunError, match=r"cannot read the image \./cat/b\.png: cannot identify"):
        ImageFolder(tmp_path)[1]
