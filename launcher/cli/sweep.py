"""`launcher sweep`: a config a point, an array job and a loop that run them all."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.config.shipped import found
from launcher.errors import UsageError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher sweep",
        description="Write a config for each point of a sweep over BASE.yaml, an array job for "
        "Slurm and a loop for one machine. The same call again changes nothing. `launcher runs "
        "list DIR` and `runs compare DIR` show the points.",
        allow_abbrev=False,
    )
    p.add_argument("base", type=Path, metavar="BASE.yaml", help="what all points have in common")
    p.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=A,B",
        help="each value with each of the other keys'; a list of lists is [a],[b]",
    )
    p.add_argument(
        "--random",
        nargs="+",
        default=[],
        metavar="N KEY=FORM",
        help="N draws: log(1e-4,1e-1), uniform(0,1), int(1,8) or choice(a,b), quoted for the shell",
    )
    p.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where to")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    if not options.grid and not options.random:
        raise UsageError("a sweep needs --grid or --random: which keys, and their values")
    from launcher.sweeps.points import settings_of
    from launcher.sweeps.write import load_points, write_sweep

    base = Path(found(str(options.base)))  # which may be the name of one that ships
    settings = settings_of(options.grid, options.random, options.seed)
    points = load_points(base, settings)
    asked = {"grid": options.grid, "random": options.random, "seed": options.seed}
    written = write_sweep(options.output, base, asked, points, list(settings[0]))
    if not written:
        print(f"{options.output} holds this very sweep of {len(points)} points already")
        return 0
    print(f"{len(points)} points in {options.output}. To run them:")
    print(f"    {options.output}/sweep.sh [torchrun ... -m launcher train]    # on this machine")
    print(f"    sbatch {options.output}/sweep.sbatch")
    print(f"To see them: launcher runs list {options.output}")
    return 0
