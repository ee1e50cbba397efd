"""Digests in the records: where they stand, what they are of, and that each stands once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.checkpoint.store import CheckpointStore
from launcher.edges.digest import Digest
from tests.callbacks.scripted import FAIL_AT, Scripted, train, words
from tests.system import jobs
from tests.system.exact import records


class Normed(Scripted):
    """With batch-norm: buffers count too."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def digests(run: Path) -> dict[int, int]:
    found = [(r["step"], r["digest"]) for r in jobs.metrics(run) if "digest" in r]
    assert len(dict(found)) == len(found), "a step has two"
    return {step: int(value) for step, value in found}


def of_checkpoint(run: Path, step: int) -> int:
    model = Normed(None).build_model()  # type: ignore[arg-type]
    model.load_state_dict(CheckpointStore(run / "checkpoints").load(step)["model"])
    return int(Digest(model)())


def test_they_stand_at_evaluations_checkpoints_and_the_period(tmp_path: Path) -> None:
    run = tmp_path / "run"
    periods = ("EVAL.EVERY", "6step", "CHECKPOINT.EVERY", "4step", "LOG.DIGEST", "5step")
    assert train(words(run, f"{__file__}:Normed", [1.0]), *periods, "TRAIN.DURATION", "13step") == 0
    found = digests(run)
    assert list(found) == [0, 4, 5, 6, 8, 10, 12, 13]
    assert len(set(found.values())) == len(found)
    for step in (4, 8, 12, 13):  # those of the weights and statistics that were saved
        assert found[step] == of_checkpoint(run, step)
    assert found[0] == int(Digest(Normed(None).build_model())())  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [jobs.slow(3), jobs.slow(6), 7])
def test_each_stands_once_over_a_crash(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kind = f"{__file__}:Normed"
    assert train(words(whole, kind, [1.0]), "LOG.DIGEST", "3step") == 0
    monkeypatch.setenv(FAIL_AT, str(fails))
    assert train(words(broken, kind, [1.0]), "LOG.DIGEST", "3step") == 1
    monkeypatch.delenv(FAIL_AT)
    assert train(words(broken, kind, [1.0]), "LOG.DIGEST", "3step", "--resume") == 0
    assert records(broken) == records(whole)


class Changed(Normed):
    """Its model does not take back what it has saved."""

    def build_model(self) -> nn.Module:
        model = super().build_model()

        def halved(module: Any, state: dict[str, Any], *_: Any) -> None:
            if state["0.weight"].abs().max() > 0 and module.training:
                state["0.weight"] = state["0.weight"] * CHANGES

        model.register_load_state_dict_pre_hook(halved)
        return model


CHANGES = 1.0


def test_a_state_that_comes_back_changed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, kind = tmp_path / "run", f"{__file__}:Changed"
    monkeypatch.setenv(FAIL_AT, "6")
    assert train(words(run, kind, [1.0])) == 1
    monkeypatch.delenv(FAIL_AT)
    import test_digests  # the task's file, as the launcher has loaded it

    monkeypatch.setattr(test_digests, "CHANGES", 0.5)
    with caplog.at_level(logging.WARNING):
        assert train(words(run, kind, [1.0]), "--resume") == 0
    assert "are not those that were saved at step 4" in caplog.text


def test_other_callbacks_keep_their_states_names() -> None:
    """Those that come and go with the config and the rank change no name in a checkpoint."""
    from launcher.callbacks import Callbacks

    class One:
        def state_dict(self) -> dict[str, Any]:
            return {}

    class Two(One):
        pass

    assert list(Callbacks([Two(), One(), Two()]).state_dict()) == ["0 Two", "0 One", "1 Two"]
    assert list(Callbacks([One()]).state_dict()) == ["0 One"]
