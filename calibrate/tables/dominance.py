"""Count which points lie below which, without looking at every pair."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray

Counts = npt.NDArray[np.int64]

_FEW_PAIRS: Final = 1 << 16  # are compared directly


def num_below(points: FloatArray, bounds: FloatArray) -> Counts:
    """How many points are nowhere larger than each bound, by multidimensional divide and conquer (Bentley 1980).

    The last axis is halved: between the halves it says nothing more, and within a half there are half as many. Takes
    n (log n)^(k - 1) and memory for n, where comparing all pairs takes n^2 of both.

    Args:
        points: (n, k).
        bounds: (m, k).

    Returns:
        (m,).
    """
    if len(points) * len(bounds) <= _FEW_PAIRS:
        return np.asarray(np.count_nonzero(np.all(points[None] <= bounds[:, None], axis=2), axis=1), np.int64)
    if points.shape[1] == 1:
        counts: Counts = np.searchsorted(np.sort(points[:, 0]), bounds[:, 0], side="right")
        return counts
    values = np.unique(np.concatenate([points[:, -1], bounds[:, -1]]))
    if len(values) == 1:
        return num_below(points[:, :-1], bounds[:, :-1])
    middle = values[len(values) // 2]
    is_low, is_below = points[:, -1] < middle, bounds[:, -1] < middle
    low, above = points[is_low], bounds[~is_below]
    counts = np.zeros(len(bounds), np.int64)
    counts[is_below] = num_below(low, bounds[is_below])
    counts[~is_below] = num_below(points[~is_low], above) + num_below(low[:, :-1], above[:, :-1])
    return counts
