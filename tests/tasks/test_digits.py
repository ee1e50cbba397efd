"""The digits task: a fixed stratified split of real data, and what its steps return."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from launcher.config import load_config
from launcher.errors import UsageError
from launcher.tasks import resolve_task
from launcher.tasks.digits import Digits


def task(*words: str) -> Digits:
    return Digits(load_config(None, ["TASK.NAME", "digits", *words], resolve_task).cfg)


@pytest.fixture(scope="module")
def splits() -> dict[str, TensorDataset]:
    return {split: task().build_dataset(split) for split in ("train", "val")}


def test_sizes_and_shapes(splits: dict[str, TensorDataset]) -> None:
    assert (len(splits["train"]), len(splits["val"])) == (1437, 360)
    for split in splits.values():
        image, label = split[0]
        assert image.shape == (1, 8, 8) and image.dtype == torch.float32
        assert label.shape == () and label.dtype == torch.int64


def test_stratified(splits: dict[str, TensorDataset]) -> None:
    """Each class has its 20 % in val, to the nearest sample."""
    train, val = (split.tensors[1].bincount() for split in splits.values())
    assert len(val) == 10
    assert ((train + val) * 0.2 - val).abs().max() < 1


def test_the_splits_are_all_of_the_data_once(splits: dict[str, TensorDataset]) -> None:
    def rows(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, ...]]:
        pixels = ((images * 0.38 + 0.3) * 16).round().long().flatten(1)
        return sorted(map(tuple, torch.cat([pixels, labels[:, None]], 1).tolist()))

    train, val = (rows(*split.tensors) for split in splits.values())
    digits = load_digits()
    original = torch.cat([torch.tensor(digits.data), torch.tensor(digits.target)[:, None]], 1)
    assert sorted(train + val) == sorted(map(tuple, original.long().tolist()))
    # No image of the 1,797 stands twice in the data, so this is what disjoint means.
    assert not set(train) & set(val)


def test_the_split_is_fixed(splits: dict[str, TensorDataset]) -> None:
    torch.manual_seed(1)
    again = task("SEED", "7").build_dataset("val")
    assert torch.equal(again.tensors[0], splits["val"].tensors[0])
    assert again.tensors[1][:12].tolist() == [0, 2, 4, 7, 1, 6, 8, 9, 5, 3, 0, 2]


@pytest.mark.parametrize("model", ["convnet", "lenet"])
def test_steps_of_both_models(splits: dict[str, TensorDataset], model: str) -> None:
    digits = task("TASK.MODEL", model)
    net = digits.build_model()
    batch = splits["val"][torch.arange(6)]
    trained = digits.train_step(net, batch)
    assert {key: value.shape for key, value in trained.items()} == {"loss": (), "accuracy": ()}
    net.eval()
    tested = digits.eval_step(net, batch)
    averaged = (torch.float32, torch.bool)
    assert sorted(k for k, v in tested.items() if v.dtype in averaged) == sorted(digits.metrics())
    assert all(value.shape == (6,) for value in tested.values())
    again = digits.train_step(net, batch)
    torch.testing.assert_close(tested["loss"].mean(), again["loss"])
    assert tested["accuracy"].float().mean() == again["accuracy"]


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(UsageError, match=r"TASK\.MODEL: 'resnet' is none of convnet, lenet"):
        task("TASK.MODEL", "resnet").build_model()


def test_dropout_is_a_key() -> None:
    net = task("TASK.DROPOUT", "0.25").build_model()
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.25]


def test_another_split_is_none() -> None:
    with pytest.raises(UsageError, match="the splits train and val, and no 'test'"):
        task().build_dataset("test")
