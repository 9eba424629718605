"""How sure a bar of the waterfall is: the interval of what one layer changes."""

from __future__ import annotations

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.stats import FloatArray, Interval
from kvtwin.validate.e2e import QUANTILES


def summary(values: FloatArray, statistic: str) -> float:
    """The mean or a quantile."""
    return float(values.mean() if statistic == "mean" else np.quantile(values, QUANTILES[statistic]))


def bar_interval(before: FloatArray, after: FloatArray, measured: FloatArray, statistic: str) -> Interval | None:
    """The 95 % interval of (T(before) - T(after)) / T(measured), T a mean or a quantile of the same requests.

    It is that of T(before) / T(after) - 1, as any error's (`stats.interval`), on the scale of the measurement: whether
    the layer does anything is sure or not by that ratio alone.

    Args:
        before, after, measured: shape (n,), in the order of arrival.
        statistic: "mean", "p50", "p90".

    Returns:
        None where an interval would say nothing, or a stage has no positive time.
    """
    scale = summary(after, statistic) / summary(measured, statistic)
    if not (np.isfinite(scale) and scale > 0):
        return None
    if np.array_equal(before, after):
        return (0.0, 0.0)
    if statistic == "mean":
        found = stats.interval(stats.ratio_of_sums(before, after))
    else:
        found = stats.interval(stats.quantile_ratio(after, before, QUANTILES[statistic]))
    return None if found is None else (scale * found[0], scale * found[1])
