"""What it costs a step that ranks agree on stops and saves: `python benchmarks/agreement.py`.

The same small backward pass with and without the agreement's passengers, in turns; prints the
median difference. The requests ride in DDP's own all-reduce, so there is no collective to measure
(tests/engine/test_ranks.py counts them).
"""

from __future__ import annotations

import statistics
import time
from collections import deque

import torch

from launcher.engine.agreement import Agreement

TURNS, STEPS = 31, 1000


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    agreement = Agreement(device, 2, deque())
    weight = torch.ones(10, requires_grad=True, device=device)

    def seconds(agreeing: bool) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            loss = (weight * 2).sum()
            if agreeing:
                (loss + agreement.loss_term(frozenset(), 8.0, False)).backward()
                agreement.seen()
                agreement.carrier.grad = None
            else:
                loss.backward()
            weight.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / STEPS

    pairs = [(seconds(True), seconds(False)) for _ in range(TURNS)]
    cost = statistics.median(a - b for a, b in pairs)
    print(f"the agreement takes {1e6 * cost:.1f} microseconds a step: {cost / 5e-5:.2f} % of 5 ms")


if __name__ == "__main__":
    main()
