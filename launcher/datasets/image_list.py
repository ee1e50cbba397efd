"""Data sets of labelled images: those that a list file names, and those in a folder a class."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from launcher.errors import RunError, UsageError

# Pillow's modes of one byte a channel, which have a plain meaning as numbers in 0..1.
BYTE_MODES = ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
# What a file's name ends in that is taken for an image, in small letters or capitals.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ListFile(Dataset):
    """Labelled images named by a list file, one `path label` a line.

    The label is the line's last field, an integer; the path is all before it and may hold spaces.
    A relative path starts at `root`, by default the list file's folder. Blank lines and lines that
    start with # are skipped (write ./# for a file whose name starts so). The file is UTF-8.

    A sample is (image, label): `transform(image)` of the Pillow image converted to `mode`, or
    without a transform a float tensor of shape (C, H, W) in 0..1; the label is an int. `labels`
    holds all labels, int64 of shape (N,), and `classes` how many there are: the largest plus one.

    Raises UsageError that names file and line for a list that cannot be understood, and, when a
    sample is taken, RunError that names file, line and path for an image that cannot be read;
    DATALOADER.ON_BAD_SAMPLE says what happens then.

    Memory: the file's own text and 16 bytes a line, in three blocks that forked workers share; a
    list of Python strings would be copied to each worker as its reference counts change.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        root: str | os.PathLike[str] = "",
        transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
    ) -> None:
        self.path = os.path.abspath(path)
        self.root = os.path.abspath(root or os.path.dirname(self.path))
        self.transform, self.mode = transform, mode
        _check_mode(mode, transform is None)
        self._text = self._read()
        self._starts, self.labels = self._parse()
        self.classes = max(0, int(self.labels.max()) + 1)

    def _read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UsageError(f"the list file {self.path}: {error.strerror}") from error

    def _parse(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each sample's line starts in the text, and its label; both int64 of shape (N,)."""
        starts, labels = array("q"), array("q")
        # Some editors put a byte order mark at the start.
        at = 3 if self._text.startswith(b"\xef\xbb\xbf") else 0
        while at < len(self._text):
            end = self._text.find(b"\n", at)
            end = len(self._text) if end < 0 else end
            line = self._text[at:end].strip()
            if line and not line.startswith(b"#"):
                labels.append(self._label(line, at))
                starts.append(at)
            at = end + 1
        if not labels:
            raise UsageError(f"the list file {self.path} names no samples")
        return np.frombuffer(starts, np.int64), np.frombuffer(labels, np.int64)

    def _label(self, line: bytes, at: int) -> int:
        fields = line.rsplit(None, 1)
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{self._place(at)}: is not UTF-8 ({error.reason})") from None
        if len(fields) < 2:
            raise UsageError(f"{self._place(at)}: expected `path label`, found {line.decode()!r}")
        digits = fields[1].removeprefix(b"-")
        # 18 digits fit in 64 bits. int() alone would also take 1_000.
        if not digits.isdigit() or len(digits) > 18:
            raise UsageError(
                f"{self._place(at)}: the label {fields[1].decode()!r}, the line's last field, is "
                "no integer"
            )
        return int(fields[1])

    def place(self, index: int) -> str:
        """Where a sample is named, for messages."""
        return self._place(int(self._starts[index]))

    def _place(self, at: int) -> str:
        """file:line. Lines are counted when they are asked for, not kept."""
        line = self._text.count(b"\n", 0, at) + 1
        return f"{self.path}:{line}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        start = int(self._starts[index])
        end = self._text.find(b"\n", start)
        line = self._text[start : len(self._text) if end < 0 else end]
        path = line.strip().rsplit(None, 1)[0].decode()
        image = self._open(path, start)
        return (self.transform or to_tensor)(image), int(self.labels[index])

    def _open(self, path: str, at: int) -> Any:
        from PIL import Image

        try:
            with Image.open(os.path.join(self.root, path)) as image:
                return image.convert(self.mode)
        except Exception as error:  # Pillow raises a dozen types for broken files
            told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(f"{self._place(at)}: cannot read the image {path}: {told}") from error


class ImageFolder(ListFile):
    """Labelled images in a folder of class folders: `path`/cat/any/where/1.jpg is of class cat.

    `names` are the classes, label i being names[i]: by default those of the folders, in the order
    of their names. Images are the files that end in one of SUFFIXES; names that start with a dot
    are passed over, and links to folders followed at the first level only. Else as ListFile, and
    as lazy: the folders are walked once, and an image is read when its sample is taken.

    Raises UsageError that names the folder where there are no class folders, where one has no
    images, and where one is not among the `names` that are given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
    ) -> None:
        self.path = os.path.abspath(path)
        found = self._class_folders()
        self.names = found if names is None else [*names]
        for name in found:
            if name not in self.names:
                raise UsageError(
                    f"{os.path.join(self.path, name)}: {name!r} is none of the "
                    f"{len(self.names)} classes to tell apart ({', '.join(self.names[:10])}"
                    f"{', ...' if len(self.names) > 10 else ''})"
                )
        self._found = found
        super().__init__(path, path, transform, mode)
        self.classes = len(self.names)

    def _class_folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                found = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
        except OSError as error:
            raise UsageError(f"the image folder {self.path}: {error.strerror}") from error
        if not found:
            raise UsageError(f"{self.path} has no class folders: images lie in one folder a class")
        return found

    def _read(self) -> bytes:
        """The folder as a list file would name its images."""
        lines = list[bytes]()
        for name in self._found:
            images = [*_images_below(os.path.join(self.path, name))]
            if not images:
                raise UsageError(
                    f"{os.path.join(self.path, name)} has no images (files that end in "
                    f"{', '.join(SUFFIXES)})"
                )
            label = self.names.index(name)
            for image in sorted(path.removeprefix(self.path).lstrip("/") for path in images):
                if re.search("[\n\ud800-\udfff]", image):
                    raise UsageError(f"{self.path}: rename {image!r}, its name is no line of UTF-8")
                lines.append(f"./{image} {label}\n".encode())
        return b"".join(lines)

    def _place(self, at: int) -> str:
        return self.path


def _images_below(folder: str) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        raise UsageError(f"the image folder {error.filename}: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                yield os.path.join(place, name)


def to_tensor(image: Any) -> torch.Tensor:
    """A Pillow image of one byte a channel as a float tensor of shape (C, H, W) in 0..1."""
    pixels = torch.from_numpy(np.array(image))
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(2)
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def _check_mode(mode: str, to_numbers: bool) -> None:
    """Here, not at the first image: with ON_BAD_SAMPLE skip every sample would be passed over."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("ListFile needs Pillow: pip install 'launcher[examples]'") from error
    try:
        Image.new("RGB", (1, 1)).convert(mode)
    except (ValueError, KeyError) as error:
        raise UsageError(f"ListFile: Pillow knows no image mode {mode!r}") from error
    if to_numbers and mode not in BYTE_MODES:
        raise UsageError(
            f"ListFile: images of mode {mode!r} need a transform; without one the mode is one of "
            f"{', '.join(BYTE_MODES)}"
        )
