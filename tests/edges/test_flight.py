"""torch's flight recorder: switched on for NCCL, and what it says of a rank's last collective."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._C._distributed_c10d as c10d

from launcher.edges import flight
from launcher.edges.flight import SINCE_2_9, SIZE, dump, summary, switch_on
from launcher.guard import guard
from tests.guard.ranks import HERE, Ranks

OURS, TORCHS = "/home/me/task.py", f"{torch.__path__[0]}/nn/parallel/distributed.py"
# Where torch records on the CPU as well, in the same format.
GLOO = """
import os, sys, torch, torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(2, 3))
dist.barrier()
sys.stdout.buffer.write(_dump_fr_trace())
"""


def entry(number: int, state: str, **more: Any) -> dict[str, Any]:
    """As torch 2.6 to 2.13 write it (FlightRecorderDetail.hpp, getCollectiveTrace)."""
    frames = [
        {"name": "all_reduce", "filename": TORCHS, "line": 1},
        {"name": "train_step", "filename": OURS, "line": 7},
    ]
    return {
        **{"record_id": number, "pg_id": 0, "process_group": ("0", "default_pg")},
        **{"collective_seq_id": number + 1, "p2p_seq_id": 0, "op_id": number + 1},
        **{"profiling_name": f"nccl:op_{number}", "time_created_ns": 1, "state": state},
        **{"input_sizes": ((2, 3),), "input_dtypes": ["Float"], "output_sizes": ((6,),)},
        **{"output_dtypes": ["Float"], "retired": state == "completed", "is_p2p": False},
        **{"timeout_ms": 600000, "frames": frames, **more},
    }


def recorder(monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any]) -> bytes:
    content = pickle.dumps({"version": "2.10", "pg_config": {}, "entries": list(entries)})
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: content, raising=False)
    return content


def test_it_is_switched_on_for_nccl_unless_the_user_has_said_so() -> None:
    def env(backend: str, **had: str) -> dict[str, str]:
        switch_on(backend, had)
        return had

    assert env("gloo") == {}
    assert env("nccl") == {SINCE_2_9 if torch.__version__ >= "2.9" else SIZE: "2000"}
    for name in (SIZE, SINCE_2_9):
        assert env("nccl", **{name: "0"}) == {name: "0"}


def test_the_last_one_and_the_one_that_the_device_is_at() -> None:
    entries = [entry(2, "scheduled"), entry(0, "completed"), entry(1, "started")]
    found = summary({"entries": entries})
    assert found["name"] == "nccl:op_2" and found["sequence"] == 3
    assert (found["started"], found["completed"]) == (False, False)
    assert found["input_sizes"] == [[2, 3]] and found["output_sizes"] == [[6]]
    assert found["group"] == "0 default_pg"
    assert found["begun_at"] == f"{OURS}:7 train_step"  # not a file of torch's own
    first = found["waits_for"]
    assert (first["name"], first["state"], first["started"]) == ("nccl:op_1", "started", True)


def test_one_that_waits_for_nothing() -> None:
    found = summary({"entries": [entry(0, "completed", is_p2p=True, p2p_seq_id=9)]})
    assert found["completed"] and found["sequence"] == 9 and "waits_for" not in found
    # One whose time is over is no longer watched, whatever state it was left in.
    assert "waits_for" not in summary({"entries": [entry(0, "started", retired=True)]})
    assert summary({"entries": []}) == {} == summary({})


def test_all_of_it_goes_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = recorder(monkeypatch, entry(0, "started"))
    file = tmp_path / "flight/rank1"
    assert dump(file)["name"] == "nccl:op_0" == dump(None)["name"]
    assert file.read_bytes() == content


def test_nothing_where_there_is_nothing_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(c10d, "_dump_nccl_trace", raising=False)  # a build without NCCL
    assert dump(tmp_path / "flight/rank0") == {}
    recorder(monkeypatch)  # as of a group on gloo
    assert dump(tmp_path / "flight/rank0") == {}
    recorder(monkeypatch, {"record_id": 1})  # another torch's
    assert dump(tmp_path / "flight/rank0") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(c10d, "_dump_nccl_trace", answer.wait, raising=False)
    monkeypatch.setattr(flight, "DUMP_S", 0.05)
    assert dump(None) == {}
    answer.set()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(c10d, "_dump_fr_trace"), reason="this torch records NCCL alone")
def test_what_torch_itself_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By gloo's recorder, which writes the same format; torch's own analyser reads the file."""
    script = tmp_path / "user.py"
    script.write_text(GLOO)
    content = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=True).stdout
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: content, raising=False)
    found = dump(tmp_path / "flight/rank0")
    assert (found["name"], found["sequence"]) == ("gloo:barrier", 2)
    assert found["begun_at"] == f"{script}:6 <module>"
    assert found["input_sizes"] == []

    from torch.distributed.flight_recorder.components.loader import read_dump

    read = read_dump("rank", str(tmp_path / "flight/rank0"))
    assert read["rank"] == 0 and len(read["entries"]) == 2  # type: ignore[arg-type]


def test_a_hang_is_told_with_each_ranks_last_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, [HERE, HERE])
    files = [ranks.run / f"logs/flight/rank{rank}" for rank in range(2)]
    told = {file: {"name": f"nccl:{file.name}"} for file in files}
    monkeypatch.setattr(guard.flight, "dump", told.get)
    ranks.stall()
    assert ranks.told["collectives"] == {"0": {"name": "nccl:rank0"}, "1": {"name": "nccl:rank1"}}


@pytest.mark.gpu
def test_nccl_itself(tmp_path: Path) -> None:
    code = (
        "import time, torch, torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from launcher.edges import flight\n"
        "flight.switch_on('nccl')\n"
        "dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(4, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
        "time.sleep(2)  # until the watchdog has seen the end\n"
        f"print(flight.dump(Path({str(tmp_path / 'flight/rank0')!r})))\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert b"'nccl:all_reduce'" in done.stdout and b"[[4]]" in done.stdout
    assert pickle.loads((tmp_path / "flight/rank0").read_bytes())["entries"]
