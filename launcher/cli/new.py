"""`launcher new`: a small project to begin with, copied from a template. Imports no torch."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from launcher.errors import UsageError

TEMPLATES = {
    "classification": "images, one loss, augmentation, accuracy",
    "lm": "windows of bytes, a transformer, perplexity, samples of text",
    "gan": "two networks with an optimiser each, two phases a step",
    "detection": "any number of objects an image, a collate, average precision",
}


def main(argv: list[str]) -> int:
    """Run `launcher new ARGV`; returns the exit code, raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="launcher new",
        description="Write a small project that trains at once: a task, its config, a test, a "
        "README and a job file. Nothing is downloaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<16}{text}" for name, text in TEMPLATES.items()),
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new or empty directory")
    parser.add_argument("--template", choices=TEMPLATES, default="classification")
    options = parser.parse_args(argv)
    written = copy(options.template, options.directory)
    config = next(name for name in written if name.endswith(".yaml"))
    print(f"{options.directory}: {', '.join(written)}")
    print(f"README.md says how to go on; for one:\n    cd {options.directory}")
    print(f"    launcher train --config-file {config}")
    return 0


def copy(template: str, directory: Path) -> list[str]:
    """Write a template's files, and those that all have, into a new or empty directory; their
    names. Raises UsageError where it is neither, or cannot be written."""
    try:
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is a file; name a new directory")
        if directory.is_dir() and (found := next(directory.iterdir(), None)):
            raise UsageError(f"{directory} is not empty ({found.name}); name a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for source in (template, "common"):
            for file in (files("launcher") / "templates" / source).iterdir():
                if file.is_file():
                    (directory / file.name).write_bytes(file.read_bytes())
                    written.append(file.name)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error.strerror}") from error
    return sorted(written, key=lambda name: (name.startswith("."), name))
