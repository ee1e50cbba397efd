"""Entries of OPTIM.GROUPS: read without loss, refused with what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config import ConfigError, load_config
from launcher.config.optim import group_entry


@pytest.mark.parametrize(
    ("text", "pattern", "values"),
    [
        ("head LR=1e-3", "head", {"LR": 1e-3}),
        (
            "'odd name.*' LR_SCALE=2 WEIGHT_DECAY=0",
            "odd name.*",
            {"LR_SCALE": 2, "WEIGHT_DECAY": 0},
        ),
        ("a BETAS=[0.9,0.95] EPS=1e-6", "a", {"BETAS": [0.9, 0.95], "EPS": 1e-6}),
        ("a MUON=no LR=1 LR=2", "a", {"MUON": False, "LR": 2}),
    ],
)
def test_entries(text: str, pattern: str, values: dict[str, Any]) -> None:
    assert group_entry(text) == (pattern, values)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("head", "'head' is no group; write for example backbone.* LR_SCALE=0.1"),
        ("LR=0.1", "is no group"),
        ("", "is no group"),
        ("head 'LR=1", "No closing quotation"),
        ("head RATE=1", "'RATE=1' is none of LR=, "),
        ("head LRSCALE=1", "did you mean LR_SCALE?"),
        ("head LR", "'LR' is none of"),
        ("head LR=0", "LR: 0.0 is out of range: it must be above 0"),
        ("head LR=fast", "LR: 'fast' is not a number"),
        ("head WEIGHT_DECAY=-1", "WEIGHT_DECAY: -1.0 is out of range"),
        ("head MOMENTUM=1", "MOMENTUM: 1.0 is out of range"),
        ("head BETAS=[0,0]", "BETAS is nothing that OPTIM.NAME sgd takes"),
        ("head MUON=true", "MUON is nothing that OPTIM.NAME sgd takes"),
    ],
)
def test_what_is_no_entry(entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"OPTIM.GROUPS={[entry]}"], require_task=False)
    (problem,) = caught.value.problems
    assert problem.key == "OPTIM.GROUPS" and says in problem.message
