"""Times that are wrong by the factor between two units: most often a column was read in another unit than it is in."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from kvtwin.calibrate.stats import FloatArray

# What one unit is of another: ns, us, ms and s lie 1000 apart; seconds and minutes 60.
_FACTORS: Final = {
    10.0**9: "ns and s",
    10.0**6: "two units apart, as ns and ms",
    10.0**3: "neighbours, as us and ms",
    60.0: "s and min",
}
_TOLERANCE: Final = 0.25  # a model may be off by a quarter on top of its unit


def unit_note(
    measured: FloatArray, simulated: FloatArray, *, whose: str = "simulated is", beside: str = "the measured"
) -> str | None:
    """A word of warning where simulated times are about a unit's factor larger or smaller; else None.

    Args:
        measured, simulated: shape (n,), in the same unit, as it is said.
        whose, beside: what the two are, in words.

    >>> unit_note(np.array([1.0, 2.0]), np.array([1010.0, 1950.0]))
    'simulated is about 1000x the measured: units taken for others (neighbours, as us and ms)?'
    """
    both = (measured > 0) & (simulated > 0)
    if not both.any():
        return None
    ratio = float(np.median(simulated[both] / measured[both]))
    for factor, units in _FACTORS.items():
        for name, expected in ((f"{factor:.0f}x", factor), (f"1/{factor:.0f} of", 1 / factor)):
            if abs(math.log(ratio / expected)) < math.log1p(_TOLERANCE):
                return f"{whose} about {name} {beside}: units taken for others ({units})?"
    return None
