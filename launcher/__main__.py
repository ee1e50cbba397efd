"""`python -m launcher`, and so `torchrun ... -m launcher train ...`."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
