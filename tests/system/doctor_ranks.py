"""`launcher doctor` on a rank whose environment is its own, as on another node."""

import os
import sys

if os.environ["RANK"] == "1":
    os.environ |= {"OMP_NUM_THREADS": "2", "NCCL_ALGO": "Tree"}

from launcher.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
