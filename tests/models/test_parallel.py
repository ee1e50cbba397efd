"""DDP's options change how gradients cross, and not what a step is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

from launcher import Task
from tests.system import jobs


class Tokens(Task):
    """Samples of unlike weights: 257 in the only batch, which 8 bits cannot hold."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 1))

    def build_dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(2)
        x = torch.randn(7, 64, generator=made)
        return TensorDataset(x, x.sum(1), torch.tensor([1.0, 2, 4, 50, 60, 70, 70]))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y, w = batch
        errors = (model(x).squeeze(1) - y).square()
        return {"loss": (errors * w).sum() / w.sum(), "weight": w.sum()}


class Noted(Tokens):
    """Writes down how DDP was made."""

    def on_start(self) -> None:
        import gc
        import json

        (ddp,) = (o for o in gc.get_objects() if type(o) is DDP)
        about = ddp._get_ddp_logging_data()
        told = {"static": about["static_graph"], "cap": about["bucket_cap_bytes"]}
        Path(self.cfg.OUTPUT_DIR, "ddp.json").write_text(json.dumps(told))


def weights(run: Path, *more: object, task: str = "Tokens") -> torch.Tensor:
    """Of two ranks after three steps, as one vector."""
    words = ("TASK.NAME", f"{__file__}:{task}", "OUTPUT_DIR", run, "TRAIN.DURATION", "3step")
    sizes = ("TRAIN.BATCH_SIZE", 7, "TRAIN.MICRO_BATCH_SIZE", 2, "OPTIM.LR", 0.01)
    rest = ("EVAL.EVERY", "", "DATALOADER.NUM_WORKERS", 0)
    jobs.train(*words, *sizes, *rest, *more, ranks=2).ok()
    return torch.cat([t.flatten() for t in jobs.state(run)["model"].values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return weights(tmp_path_factory.mktemp("plain") / "run")


def test_a_static_graph_and_buckets(plain: torch.Tensor, tmp_path: Path) -> None:
    """With accumulation and uneven rounds, and they do reach DDP."""
    words = ("DIST.STATIC_GRAPH", True, "DIST.BUCKET_MB", 0.01)
    found = weights(tmp_path / "run", *words, task="Noted")
    torch.testing.assert_close(found, plain)
    told = (tmp_path / "run/ddp.json").read_text()
    assert '"static": 1' in told.replace("true", "1") and '"cap": 10485' in told


def test_gradients_of_16_bits(plain: torch.Tensor, tmp_path: Path) -> None:
    """They are rounded, each by itself; the batch's weight, which scales them all, is not."""
    made = torch.cat([t.flatten() for t in Tokens(None).build_model().state_dict().values()])  # type: ignore[arg-type]
    words = ("DIST.GRADIENT_COMPRESSION", "bf16", "DIST.BUCKET_MB", 0.01)
    found = weights(tmp_path / "run", *words)
    assert not torch.equal(found, plain)
    ours, theirs = found - made, plain - made
    assert (ours - theirs).norm() < 0.005 * theirs.norm()
    # 257 would be 256 or 258 in 8 bits: a factor of 1.004 for every weight.
    assert (ours @ theirs / theirs.square().sum()).item() == pytest.approx(1, abs=5e-4)
