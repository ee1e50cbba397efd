"""A gradient norm that rises far beyond its recent spread is told of."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
# Records that make the recent spread, and the fewest that do; a norm is far beyond it where it is
# so many times the median, and its logarithm so many median deviations above the median's.
RECENT, FEWEST, TIMES, DEVIATIONS = 50, 10, 4.0, 8.0


class Spikes:
    """Warns where `train/grad_norm` of a record is far beyond those of the records before it."""

    def __init__(self, run: Run) -> None:
        self.run, self.recent = run, dict[str, deque[float]]()

    def on_record(self, record: Mapping[str, Any] | None) -> None:
        for key, norm in (record or {}).items():
            if not key.startswith("train/grad_norm") or not math.isfinite(norm):
                continue
            recent = self.recent.setdefault(key, deque(maxlen=RECENT))
            if len(recent) >= FEWEST:
                median = statistics.median(recent)
                logs = [math.log(max(other, 1e-300) / max(median, 1e-300)) for other in recent]
                spread = statistics.median(map(abs, logs))
                if norm > median * max(TIMES, math.exp(min(DEVIATIONS * spread, 700))) > 0:
                    logger.warning(
                        "%s is %.4g at step %d; in the %d records before the median was %.4g. To "
                        "look at such a step: launcher replay %s --step %d --stats",
                        *(key, norm, record["step"], len(recent), median),  # type: ignore[index]
                        *(self.run.directory, record["step"]),  # type: ignore[index]
                    )
            recent.append(norm)
