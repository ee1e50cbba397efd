"""A file system with control groups, as the kernel shows them."""

from pathlib import Path

V2 = "0::/job/step"
V1 = "4:memory:/job/step\n3:cpu,cpuacct:/job/step"
HYBRID = f"{V1}\n{V2}"


def cgroup(root: Path, proc: str, files: dict[str, object]) -> Path:
    """Make /proc/self/cgroup and files below /sys/fs/cgroup under `root`; returns that."""
    whole = {"proc/self/cgroup": proc, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}
    for name, text in whole.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root
