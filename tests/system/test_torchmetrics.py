"""Metrics of torchmetrics in start, merge and summarize: those of COCO's own evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system import jobs

CONFIG = jobs.ROOT / "examples/detection.yaml"
TASK = Path(__file__).with_name("torchmetrics_task.py")
try:
    from torchmetrics.detection import MeanAveragePrecision  # noqa: F401
except (ImportError, RuntimeError) as error:  # torchvision beside another torch raises either
    pytest.skip(f"torchmetrics' detection cannot be imported: {error}", allow_module_level=True)


@pytest.mark.parametrize("ranks", [None, 2])
def test_the_mean_average_precision_is_that_of_coco(ranks: int | None, tmp_path: Path) -> None:
    found = []
    for name in (CONFIG.with_name("detection.py:Detection"), f"{TASK}:Torchmetrics"):
        run = tmp_path / f"{len(found)}"
        words = ("TASK.NAME", name, "OUTPUT_DIR", run, "TRAIN.DURATION", "3ep", "EVAL.EVERY", "3ep")
        jobs.train("--config-file", CONFIG, *words, ranks=ranks).ok()
        metrics = jobs.metrics(run)[-1]
        found.append({key: value for key, value in metrics.items() if key.startswith("val/")})
    coco, theirs = found
    assert coco["val/map"] > 0.02 and coco["val/mask_map"] > 0.002
    assert theirs == pytest.approx(coco, abs=1e-5)
