"""Which learning rate the curve of a range test speaks for, or why it speaks for none. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.runs.plot import smooth
from launcher.runs.records import Array

# The loss must fall by so many times its own scatter (as it is left after smoothing).
CLEAR = 4.0
LEAST = 10  # points of a curve


@dataclass(frozen=True)
class Suggestion:
    """What is read off a curve. A rate that is None was not found; `why` says what was."""

    rate: float | None
    lowest: float | None  # the rate at which the smoothed loss was lowest
    rises: float | None  # from which on it has lost half of what it had gained, or is not finite
    smoothed: Array
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {"suggestion": self.rate, "lowest": self.lowest, "rises": self.rises} | {
            "why": self.why
        }


def centred(values: Array) -> Array:
    """Smoothed over about a twentieth of the curve, to both sides alike: no fall or rise comes
    later than it was. What is far above the start is cut off, so that a diverging end does not
    reach back."""
    top = values[: max(1, len(values) // 10)].max()
    values = np.minimum(values, 2 * top - values.min())
    weight = 1 - 1 / max(2.0, len(values) / 20)
    return smooth(smooth(values, weight)[::-1], weight)[::-1]


def suggest(rates: Array, losses: Array) -> Suggestion:
    """From the losses after an update at each of the rising rates.

    The suggestion is the rate at which the smoothed loss falls most steeply over the logarithm of
    the rate, before it is lowest.
    """
    known = int(np.argmin(np.isfinite(losses))) if not np.isfinite(losses).all() else len(losses)
    smoothed = np.full(len(losses), np.nan)

    def none(why: str, low: float | None = None, rises: float | None = None) -> Suggestion:
        return Suggestion(None, low, rises, smoothed, why)

    if known < LEAST:
        why = f"only {known} losses are finite: begin at a lower rate (--from)"
        return none(why, rises=float(rates[known]) if known < len(rates) else None)
    smoothed[:known] = curve = centred(losses[:known])
    low = int(np.argmin(curve))
    fall = float(curve[0] - curve[low])
    lost = np.flatnonzero(curve[low:] > curve[low] + fall / 2)
    end = low + int(lost[0]) if len(lost) else known
    lowest, rises = float(rates[low]), float(rates[end]) if end < len(rates) else None
    # What is left of the scatter: smoothing of this kind is over about a twentieth of the curve.
    scatter = float(np.std((losses[:known] - curve)[: low + 1])) / np.sqrt(max(2, known / 20))
    if fall <= CLEAR * scatter or low < 3:
        told = f"the loss never falls clearly: by {max(fall, 0):.3g}, and it scatters by as much"
        if low < 3 and rises is not None:
            return none("the loss rises from the first rates on: begin lower (--from)", None, rises)
        return none(f"{told}. A larger batch, or more --steps, may show more", lowest, rises)
    slope = np.gradient(curve, np.log(rates[:known]))
    rate = float(rates[int(np.argmin(slope[:low]))])
    why = f"where the loss falls most steeply; it is lowest at {lowest:.2g}"
    if rises is not None:
        why += f", and rises from about {rises:.2g} on"
    else:
        why += ". It does not rise up to the end: a higher --to may show a better rate"
    return Suggestion(rate, lowest, rises, smoothed, why)
