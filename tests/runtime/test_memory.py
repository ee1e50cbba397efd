"""Memory: the least of what is free and what every enclosing cgroup leaves; kills by the kernel."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launcher.runtime.memory import memory_budget, oom_kills
from tests.runtime.groups import HYBRID, V1, V2, cgroup

GIB = 2**30


@pytest.fixture(autouse=True)
def swap(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of a machine of 64 GiB, 48 of them free."""
    swap = SimpleNamespace(used=0, total=0)
    memory = SimpleNamespace(available=48 * GIB, total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    return swap


def v2(group: str, limit: int | str, usage: int) -> dict[str, object]:
    most = limit if isinstance(limit, str) else limit * GIB
    return {f"{group}/memory.max": most, f"{group}/memory.current": usage * GIB}


def v1(group: str, limit: int, usage: int) -> dict[str, object]:
    files = {"limit_in_bytes": limit, "usage_in_bytes": usage * GIB}
    return {f"memory/{group}/memory.{name}": value for name, value in files.items()}


@pytest.mark.parametrize(
    ("proc", "files", "available"),
    [
        (V2, v2("job/step", 8, 3), 5),
        (V2, {**v2("job/step", 8, 1), **v2("job", 16, 12)}, 4),
        (V2, {**v2("job/step", 6, 3), **v2("job", 16, 2)}, 3),
        (V2, {**v2("job/step", "max", 3), **v2("job", 16, 12)}, 4),
        (V2, v2("job/step", "max", 3), 48),
        (V2, v2(".", 8, 2), 6),  # a container that names a path of the host
        (V2, v2("job/step", 8, 9), 0),  # over its limit, as just before a kill
        (V2, v2("job/step", 1000, 1), 48),  # a limit beyond the machine
        (V2, {"job/step/memory.max": 8 * GIB}, 48),
        (V2, {"job/step/memory.max": "what", "job/step/memory.current": 1}, 48),
        (V1, v1("job/step", 8 * GIB, 3), 5),
        (V1, {**v1("job/step", 8 * GIB, 1), **v1("job", 16 * GIB, 12)}, 4),
        (V1, v1("job/step", 9223372036854771712, 3), 48),  # v1's "no limit"
        (HYBRID, v1("job/step", 8 * GIB, 3), 5),
        ("", {}, 48),
    ],
)
def test_the_tightest_group_counts(
    tmp_path: Path, proc: str, files: dict[str, object], available: int
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
    tmp_path: Path, swap: SimpleNamespace, used: float, total: int, swapping: bool
) -> None:
    swap.used, swap.total = int(used * GIB), total * GIB
    assert memory_budget(tmp_path).swapping is swapping


def test_no_shared_memory_and_no_cgroups(tmp_path: Path) -> None:
    found = memory_budget(tmp_path)
    assert found.shm is None and found.available == 48 * GIB
    assert oom_kills(tmp_path) == 0


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"job/step/memory.events": "low 0\noom 4\noom_kill 3"}, 3),
        ({"job/step/memory.events": "low 0"}, 0),
        ({"job/memory.events": "oom_kill 2", "job/step/other": ""}, 2),
        ({}, 0),
    ],
)
def test_kills_for_memory(tmp_path: Path, files: dict[str, object], kills: int) -> None:
    assert oom_kills(cgroup(tmp_path, V2, files)) == kills
