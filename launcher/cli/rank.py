"""A rank that `launcher.train` has started: the command, which leaves its last word in a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launcher.api.ranks import ERROR_FILE
from launcher.cli.train import train
from launcher.errors import Ended, UsageError


def main(argv: list[str]) -> int:
    """The exit code of `launcher train ARGV`, as under torchrun."""
    try:
        return train(argv)
    except UsageError as error:
        word = {"usage": str(error), "exit_code": error.exit_code}
        Path(os.environ[ERROR_FILE]).write_text(json.dumps(word), encoding="utf-8")
        return error.exit_code
    except Ended as ended:
        return ended.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
