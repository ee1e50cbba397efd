"""What stands in a file of `torch.save`, read without loading it. Imports no torch."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

# What loading with `weights_only` takes, as far as names tell.
KNOWN = re.compile(
    r"torch\.(\w+|(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|bytearray|complex)"
)


def strangers(path: Path) -> list[str]:
    """The classes and functions in a file that a resume would refuse to load. Raises OSError or
    zipfile.BadZipFile where it cannot be read."""
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
        operations = pickletools.genops(file.read(name))
        names = {str(given).replace(" ", ".") for op, given, _ in operations if op.name == "GLOBAL"}
    return sorted(name for name in names if not KNOWN.fullmatch(name))
