"""A file system with control groups, as the kernel shows them."""

from pathlib import Path


def cgroup(root: Path, proc: str, files: dict[str, str]) -> Path:
    """Make /proc/self/cgroup and files below /sys/fs/cgroup under `root`; returns that."""
    whole = {"proc/self/cgroup": proc, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}
    for name, text in whole.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
