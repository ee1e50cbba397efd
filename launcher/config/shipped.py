"""The configs that ship, by their names: those of configs/, which is a folder of the package."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"


def shipped() -> dict[str, Path]:
    """The files by name, in the order of their names."""
    return {name: FOLDER / f"{name}.yaml" for name in sorted(p.stem for p in FOLDER.glob("*.yaml"))}


def found(config_file: str) -> str:
    """The file itself where it exists, else the one that ships under this name, if any does."""
    name = config_file.removesuffix(".yaml")
    if os.path.isfile(config_file) or name not in (configs := shipped()):
        return config_file
    return str(configs[name])


def first_comment(path: Path) -> str:
    """The first line of a file, where that is a comment."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
