"""A run that ends with its best weights in the model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from launcher.callbacks.best_weights import BestWeights
from launcher.errors import UsageError
from tests.callbacks.helpers import view
from tests.callbacks.scripted import Scripted, train, words
from tests.edges.test_zoo import same
from tests.system import jobs


class Keeps(Scripted):
    """Writes down which weights it sees at the end."""

    def build_model(self) -> nn.Module:
        self.model = super().build_model()
        return self.model

    def on_end(self) -> None:
        torch.save(self.model.state_dict(), Path(self.cfg.OUTPUT_DIR, "end.pt"))


@pytest.mark.parametrize("decay", ["0.0", "0.9"])
def test_what_comes_after_has_the_weights_of_the_best_checkpoint(
    decay: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, case = tmp_path / "run", ("MODEL.EMA_DECAY", decay)
    task = f"{__file__}:Keeps"
    with caplog.at_level(logging.INFO):
        assert train(words(run, task, [3, 2, 1, 4], "best_weights"), *case) == 0
    assert any("weights of step 6, the best: val/loss 1.0" in line for line in caplog.messages)
    best, last = jobs.state(run, 6), jobs.state(run, 16)
    weights = best["model"]
    if decay != "0.0":
        weights = {n.removeprefix("module."): v for n, v in best["ema"].items() if "." in n[7:]}
    assert same(dict(torch.load(run / "end.pt")), weights)
    assert not same(weights, last["model"])
    assert jobs.status(run)["state"] == "completed"


def test_where_nothing_is_the_best_the_weights_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train(words(run, f"{__file__}:Keeps", ["nan"], "best_weights")) == 0
    assert any("the weights stay those of the run's end" in line for line in caplog.messages)
    assert same(dict(torch.load(run / "end.pt")), jobs.state(run, 16)["model"])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("EVAL.EVERY", "", "nothing is evaluated"),
        ("EVAL.SPLITS", [], "nothing is evaluated"),
        ("CHECKPOINT.KEEP_BEST", 0, r"CHECKPOINT\.KEEP_BEST is 0"),
    ],
)
def test_it_is_refused_where_there_will_be_no_best(key: str, value: object, told: str) -> None:
    run = view()
    section, name = key.split(".")
    run.cfg[section][name] = value
    with pytest.raises(UsageError, match=rf"BestWeights: {told}, so no checkpoint is the best"):
        BestWeights(run)
