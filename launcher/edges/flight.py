"""torch's flight recorder: what NCCL was at on each rank, told when a run hangs.

NCCL's collectives run on the device: where they hang, a Python stack shows only who waits for the
device. The recorder keeps this process's last collectives, their state, and who began them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch._C._distributed_c10d

# Its name up to torch 2.8 and from 2.9 on, which warns of the earlier one.
SIZE, SINCE_2_9 = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"
ENTRIES = "2000"  # torch's own default, in the versions that record by default
# For how long a dump may take: it asks the driver, which may be what hangs.
DUMP_S = 2.0


def switch_on(backend: str, env: MutableMapping[str, str] = os.environ) -> None:
    """Have torch record NCCL's collectives, where the user has not said how many; before the
    process group is made."""
    if backend == "nccl" and not {SIZE, SINCE_2_9} & env.keys():
        env[SINCE_2_9 if torch.__version__ >= "2.9" else SIZE] = ENTRIES


def dump(file: Path | None) -> dict[str, Any]:
    """What this rank's recorder says of its last collective, as `summary`; all that it has goes to
    `file`, as torch's own analyser reads it. Empty where nothing is recorded, or the recorder does
    not answer in time. Never raises."""
    # Of builds with NCCL.
    record: Any = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    found: dict[str, Any] = {}

    def ask() -> None:
        with contextlib.suppress(Exception):  # another torch's format, a full disk
            content = record()
            # Our own process's memory, not a file.
            found.update(summary(pickle.loads(content)))
            if found and file is not None:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)

    if record is not None:
        thread = threading.Thread(target=ask, name="flight recorder", daemon=True)
        thread.start()
        thread.join(DUMP_S)
    return dict(found)


def summary(trace: dict[str, Any]) -> dict[str, Any]:
    """The last collective that was begun, and in `waits_for` the first that is not complete, where
    there is one: that is where the device is."""
    entries = sorted(trace.get("entries", ()), key=lambda entry: entry["record_id"])
    if not entries:
        return {}
    # A retired one is no longer watched: it is complete, or its time was over.
    left = [e for e in entries if e["state"] != "completed" and not e.get("retired")]
    return _told(entries[-1]) | ({"waits_for": _told(left[0])} if left else {})


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    state = entry["state"]
    told = {
        "name": entry["profiling_name"],
        "group": " ".join(map(str, entry["process_group"])),
        "sequence": entry["p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id"],
        "state": state,
        "started": state in ("started", "completed"),
        "completed": state == "completed",
        "input_sizes": [list(size) for size in entry["input_sizes"]],
        "output_sizes": [list(size) for size in entry["output_sizes"]],
    }
    if frames := entry.get("frames"):
        # Who began it: the innermost frame that is not torch's own.
        ours = [frame for frame in frames if not frame["filename"].startswith(torch.__path__[0])]
        frame = (ours or frames)[0]
        told["begun_at"] = f"{frame['filename']}:{frame['line']} {frame['name']}"
    return told
