"""Where the time goes, and the time to the end."""

import pytest

from launcher.engine.timing import Timing


def test_evaluations_and_saves_are_in_the_time_to_the_end_alone() -> None:
    timing = Timing(attempt=50.0, first=20, began=60.0, data=3.0)
    timing.away, timing.samples, timing.steps = 4.0, 80, 10
    assert timing.figures(70.0, data=4.5, step=30, total_steps=100) == {
        "perf/step_s": pytest.approx(0.6),
        "perf/data_s": pytest.approx(0.15),
        "perf/samples_per_s": pytest.approx(80 / 6),
        "perf/eta_s": 140.0,
    }
    timing.restart(72.0, data=5.0)
    timing.steps = 1
    assert timing.figures(73.0, data=5.5, step=110, total_steps=100) == {
        "perf/step_s": 1.0,
        "perf/data_s": 0.5,
        "perf/samples_per_s": 0.0,
        "perf/eta_s": 0.0,
    }
