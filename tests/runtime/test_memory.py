"""Memory: the least of what is free and what every enclosing cgroup leaves; kills by the kernel."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launcher.runtime.memory import memory_budget, oom_kills
from tests.runtime.groups import cgroup

GIB = 2**30
V2 = "0::/job/step\n"
V1 = "4:memory:/job/step\n3:cpu,cpuacct:/job/step\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, 48 of them free, no swap."""
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=48 * GIB, total=64 * GIB)
    )
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=0, total=0))


def v2(folder: str, limit: float | str, usage: float) -> dict[str, str]:
    most = limit if isinstance(limit, str) else str(int(limit * GIB))
    return {f"{folder}memory.max": f"{most}\n", f"{folder}memory.current": f"{int(usage * GIB)}\n"}


def v1(folder: str, limit: int, usage: float) -> dict[str, str]:
    folder = f"memory/{folder}"
    return {
        f"{folder}memory.limit_in_bytes": f"{limit}\n",
        f"{folder}memory.usage_in_bytes": f"{int(usage * GIB)}\n",
    }


@pytest.mark.parametrize(
    ("proc", "files", "available"),
    [
        (V2, v2("job/step/", 8, 3), 5),
        (V2, {**v2("job/step/", 8, 1), **v2("job/", 16, 12)}, 4),
        (V2, {**v2("job/step/", 6, 3), **v2("job/", 16, 2)}, 3),
        (V2, {**v2("job/step/", "max", 3), **v2("job/", 16, 12)}, 4),
        (V2, v2("job/step/", "max", 3), 48),
        (V2, v2("", 8, 2), 6),  # a container that names a path of the host
        (V2, v2("job/step/", 8, 9), 0),  # over its limit, as just before a kill
        (V2, v2("job/step/", 1000, 1), 48),  # a limit beyond the machine
        (V2, {"job/step/memory.max": f"{8 * GIB}\n"}, 48),
        (V2, {"job/step/memory.max": "what\n", "job/step/memory.current": "1\n"}, 48),
        (V1, v1("job/step/", 8 * GIB, 3), 5),
        (V1, {**v1("job/step/", 8 * GIB, 1), **v1("job/", 16 * GIB, 12)}, 4),
        (V1, v1("job/step/", 9223372036854771712, 3), 48),  # v1's "no limit"
        (V1 + V2, v1("job/step/", 8 * GIB, 3), 5),
        ("", {}, 48),
    ],
)
def test_the_tightest_group_counts(
    tmp_path: Path, proc: str, files: dict[str, str], available: int
) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = memory_budget(cgroup(tmp_path, proc, files))
    assert found.available == available * GIB
    assert found.reason == ("free memory" if available == 48 else "cgroup memory limit")
    assert found.shm is not None and found.shm > 0


@pytest.mark.parametrize(
    ("used", "total", "swapping"),
    [(0, 0, False), (0, 8, False), (0.5, 8, False), (1, 8, True), (8, 8, True)],
)
def test_a_machine_that_swaps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    used: float,
    total: float,
    swapping: bool,
) -> None:
    swap = SimpleNamespace(used=int(used * GIB), total=int(total * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    assert memory_budget(tmp_path).swapping is swapping


def test_no_shared_memory_and_no_cgroups(tmp_path: Path) -> None:
    found = memory_budget(tmp_path)
    assert found.shm is None and found.available == 48 * GIB
    assert oom_kills(tmp_path) == 0


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"job/step/memory.events": "low 0\noom 4\noom_kill 3\n"}, 3),
        ({"job/step/memory.events": "low 0\n"}, 0),
        ({"job/memory.events": "oom_kill 2\n", "job/step/other": ""}, 2),
        ({}, 0),
    ],
)
def test_kills_for_memory(tmp_path: Path, files: dict[str, str], kills: int) -> None:
    assert oom_kills(cgroup(tmp_path, V2, files)) == kills
