#!/usr/bin/env python3
"""Train from a checkout: `torchrun ... tools/train.py --config-file configs/digits.yaml`.

The same as `launcher train`. The path of a run, file by file:

    launcher/cli/train.py        options, the run directory, mistakes
    launcher/config/load.py      the config: defaults, _BASE_, file, command line
    launcher/runtime/process.py  rank, device, process group, seeds
    launcher/engine/run.py       task, data, model, and the training loop
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
