"""The sine task: its data are fixed, its mistakes are named, and its config trains."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.config import load_config
from launcher.errors import UsageError
from launcher.tasks import resolve_task
from launcher.tasks.sine import Sine

CONFIG = str(Path(__file__).parents[2] / "configs" / "sine.yaml")


def task(*overrides: str) -> Sine:
    config = load_config(CONFIG, overrides, resolve_task)
    assert config.task is Sine
    return Sine(config.cfg)


def test_the_data_are_the_same_for_every_seed_and_draw_no_global_numbers() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a = task("SEED", "0").build_dataset("train")
    b = task("SEED", "7").build_dataset("train")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(map(torch.equal, a.tensors, b.tensors))
    assert a.tensors[0].shape == (8192, 16, 2) and a.tensors[1].shape == (8192, 2)


def test_the_splits_differ_and_their_sizes_are_keys() -> None:
    small = task("TASK.TRAIN_SAMPLES", "50", "TASK.VAL_SAMPLES", "20", "TASK.WINDOW", "3")
    train, val = small.build_dataset("train"), small.build_dataset("val")
    assert train.tensors[0].shape == (50, 3, 2) and len(val) == 20
    assert not torch.equal(train.tensors[0][:20], val.tensors[0])


def test_the_targets_go_on_with_the_series() -> None:
    windows, following = task("TASK.NOISE", "0").build_dataset("val").tensors
    # All steps of a series turn by the same angle.
    angles = torch.atan2(*torch.cat([windows, following[:, None]], 1).unbind(2))
    turns = (angles[:, 1:] - angles[:, :-1]) % (2 * torch.pi)
    assert (turns - turns[:, :1]).abs().max() < 1e-4
    assert turns.min() > 0.0099 * 2 * torch.pi and turns.max() < 0.101 * 2 * torch.pi


@pytest.mark.parametrize(
    "key, value", [("WINDOW", "0"), ("VAL_SAMPLES", "-1"), ("FREQUENCY", "0"), ("NOISE", "-1")]
)
def test_wrong_keys_are_named(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"TASK.{key}"):
        task(f"TASK.{key}", value)


def test_the_steps_return_the_metrics_and_the_model_learns() -> None:
    sine = task()
    torch.manual_seed(0)
    model = sine.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    train, val = sine.build_dataset("train"), sine.build_dataset("val")[:]
    result = sine.eval_step(model, val)
    assert sorted(result) == sorted(Sine.metrics())
    assert all(values.shape == (1024,) for values in result.values())
    before = result["loss"].mean()
    for step in range(60):
        batch = train[128 * (step % 64) : 128 * (step % 64 + 1)]
        optimizer.zero_grad()
        sine.train_step(model, batch)["loss"].backward()
        optimizer.step()
    assert sine.eval_step(model, val)["loss"].mean() < 0.1 * before
    whole = sine.train_step(model, val)
    for name, values in sine.eval_step(model, val).items():
        torch.testing.assert_close(whole[name], values.mean())
