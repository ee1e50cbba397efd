"""The garbage collector rests while a training process imports torch, and only then."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest

from launcher.cli.imports import imported, resting

SCRIPT = """
import gc, json, sys
from launcher.cli.imports import imported, resting
told = []
with resting():
    told.append(gc.isenabled())
    import torch
    imported()
    told += [gc.isenabled(), "torch._dynamo" in sys.modules, gc.get_freeze_count() > 10000]
print(json.dumps(told))
"""


def test_in_a_process_of_its_own() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert json.loads(ended.stdout) == [False, True, True, True], ended.stderr


def test_a_command_that_fails_before_torch_leaves_it_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ValueError), resting():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_in_a_process_that_has_torch_it_is_left_alone() -> None:
    import torch  # noqa: F401

    frozen = gc.get_freeze_count()
    with resting():
        assert gc.isenabled()
        imported()
    assert gc.get_freeze_count() == frozen
