"""What a task's methods return: taken as numbers of any make, or refused by name."""

from __future__ import annotations

from collections import UserDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from launcher.edges.returned import (
    averages,
    joined,
    number,
    per_sample,
    same_names,
    scalars,
    summarized,
)
from launcher.errors import RunError

CPU = torch.device("cpu")
LOSS = torch.ones((), requires_grad=True) * 2
LARGE = 2**53 - 1  # no float32


@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        float(LARGE),
        np.int64(LARGE),
        np.uint64(LARGE),
        np.float64(LARGE),
        np.array(LARGE),
        torch.tensor(LARGE),
        torch.tensor(float(LARGE), dtype=torch.float64),
        Fraction(LARGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whole_numbers_are_exact_whatever_they_come_as(value: Any) -> None:
    taken = scalars(UserDict(loss=LOSS, value=value), CPU, "T.train_step")["value"]
    assert taken.double().item() == LARGE
    assert summarized({"value": value}, "T.summarize") == {"value": float(LARGE)}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        *((True, 1.0), (np.bool_(True), 1.0), (np.float16(0.5), 0.5)),
        *(("1", None), (1j, None), (None, None), (np.ones(1), None), (torch.ones(()), None)),
        (10**400, None),
    ],
)
def test_what_a_plain_number_is(value: Any, plain: float | None) -> None:
    assert number(value) == plain


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss": LOSS, "lr": 1.0}, "'lr', a name that is taken: .* train/grad_norm"),
        ({"loss": LOSS, "lr/head": 1.0}, "'lr/head', a name that is taken"),
        ({"loss": LOSS, "grad_norm": LOSS}, "'grad_norm', a name that is taken"),
        ({"loss": LOSS, "phase": 1j}, "real scalars; 'phase' is complex"),
        (
            {"loss": LOSS, "phase": LOSS * 1j},
            "real scalars; 'phase' is a number of torch.complex64",
        ),
        ({"loss": LOSS, 1: 1.0}, "gave the name 1: a name is a line of text"),
        ({"loss": LOSS, "": 1.0}, "gave the name ''"),
        ({"loss": LOSS, "a\nb": 1.0}, r"gave the name 'a\\nb'"),
        ({"loss": LOSS, "name": "x"}, "'name' is str"),
        ({"loss": LOSS, "logits": torch.ones(2, 3)}, r"'logits' is \(2, 3\)"),
        ({"loss": 1.0}, "depends on no weight"),
    ],
)
def test_what_a_train_step_may_not_return(values: Any, told: str) -> None:
    with pytest.raises(RunError, match=rf"T\.train_step .*{told}"):
        scalars(values, CPU, "T.train_step")


def test_values_of_samples_may_come_as_numpy_arrays() -> None:
    found = per_sample({"a": np.arange(3), "b": torch.ones(3, 2)}, 3, "T.eval_step")
    assert torch.equal(found["a"], torch.arange(3)) and found["b"].shape == (3, 2)


@pytest.mark.parametrize(
    "value", [np.array(["a", "b", "c"]), [1, 2], (1, 2, 3), torch.ones(2), 1.0]
)
def test_values_that_are_none_of_the_samples_are_told(value: Any) -> None:
    with pytest.raises(RunError, match=r"T\.eval_step must .* shape \(3, \.\.\.\)"):
        per_sample({"a": value}, 3, "T.eval_step")


def test_batches_that_cannot_be_put_together_are_told_with_name_and_shapes() -> None:
    wide, narrow = {"x": torch.ones(2, 5)}, {"x": torch.ones(2, 4)}
    with pytest.raises(RunError, match=r"'x' of shape \(2, 5\) .* \(2, 4\) for batch 2.*Pad"):
        joined([wide, narrow], "T.eval_step")
    with pytest.raises(RunError, match="returned x for batch 1, but y for batch 3"):
        same_names(["y"], 2, ["x"], 0, "T.eval_step")
    with pytest.raises(RunError, match=r"'x' of shape list .* \(2, 4\) for batch 2"):
        joined([{"x": [1, 2]}, narrow], "T.eval_step")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0], "a dict of numbers, not list"),
        ({"f1": "high"}, "'f1' is str"),
        ({"confusion": torch.ones(2, 2)}, r"'confusion' is \(2, 2\)"),
    ],
)
def test_what_a_summarize_may_not_return(values: Any, told: str) -> None:
    with pytest.raises(RunError, match=rf"T\.summarize must return .*{told}"):
        summarized(values, "T.summarize")


def test_the_mean_of_equal_numbers_is_that_number_however_large() -> None:
    """A sum of five of them is not exact."""
    values = torch.full((5,), float(LARGE), dtype=torch.float64)
    assert averages({"value": values}, "T.eval_step") == [("value", float(LARGE), 5)]
    weighted = {"value": values, "weight": torch.rand(5)}
    assert averages(weighted, "T.eval_step")[0][1] == float(LARGE)
