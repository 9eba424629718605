"""How wrong predicted times are: one summary for every fit, one set of metrics for predicted steps."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate import stats
from kvtwin.sim.latency.stats import REGIMES

# The step metrics that can be negative; the others are sizes.
SIGNED: Final = ("step_bias", "step_mean_error")


def summarize(
    measured_ns: npt.ArrayLike, predicted_ns: npt.ArrayLike, *, groups: npt.ArrayLike | None = None
) -> dict[str, Any]:
    """Errors of hold-out predictions, relative to the measurement, as plain numbers for JSON.

    The interval is the 95 % one of the MAPE. It takes whole groups for the rows where they are given (rows that share
    a cause: a table row, a run), since errors within a group repeat one another. Without groups neighbouring rows may
    depend on one another: pass the rows in the order of time.

    Args:
        measured_ns, predicted_ns: positive measurements and their predictions, shape (n,); any one unit will do.
        groups: label of each row's group, shape (n,).

    Returns:
        n; mape, the mean |predicted / measured - 1|, and its interval [low, high]; bias, the mean signed error;
        p50, p90, p99 of the absolute error. All but n are fractions (0.05 is 5 %); they are None where n is 0, and
        the interval is None for fewer than five groups (or rows), which tell too little.

    Raises:
        ValueError: a measurement is not positive, or a prediction is not finite.

    >>> found = summarize([100, 200], [110, 160])
    >>> found["n"], round(found["mape"], 6), round(found["bias"], 6), found["interval"]
    (2, 0.15, -0.05, None)
    """
    measured, predicted = np.asarray(measured_ns, np.float64), np.asarray(predicted_ns, np.float64)
    if not (np.all(measured > 0) and np.all(np.isfinite(predicted))):
        raise ValueError("measurements must be positive and predictions finite")
    n = len(measured)
    if n == 0:
        return {"n": 0, **dict.fromkeys(("mape", "interval", "bias", "p50", "p90", "p99"))}
    error = stats.relative_errors(measured, predicted)
    size = np.abs(error)
    interval = _interval(size, None if groups is None else np.asarray(groups))
    p50, p90, p99 = np.quantile(size, [0.5, 0.9, 0.99]).tolist()
    return {
        "n": n,
        "mape": float(size.mean()),
        "interval": None if interval is None else list(interval),
        "bias": float(error.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
    }


def _interval(size: stats.FloatArray, groups: npt.NDArray[Any] | None) -> stats.Interval | None:
    """Of the mean of `size`."""
    if groups is None:
        return stats.interval(stats.mean(size))
    _, place = np.unique(groups, return_inverse=True)
    count = np.bincount(place.ravel()).astype(np.float64)
    total = np.bincount(place.ravel(), weights=size).astype(np.float64)
    return stats.interval(stats.pooled_mean(total, count), independent=True)


def step_statistics(
    measured: stats.FloatArray, predicted: stats.FloatArray, regime: npt.NDArray[np.str_]
) -> dict[str, stats.Statistic]:
    """Every step metric by name, as a statistic of weighted rows. `measured` is positive throughout.

    step_mape: mean |relative error|, and of each regime that occurs; step_pNN_ape: its quantiles;
    step_bias: relative error of the total time; step_mean_error: mean of the signed relative errors.
    """
    error = stats.relative_errors(measured, predicted)
    size = np.abs(error)
    return {
        "step_mape": stats.mean(size),
        **{f"step_mape_{name}": stats.mean(size, regime == name) for name in REGIMES if name in regime},
        "step_bias": stats.ratio_of_sums(predicted, measured),
        "step_mean_error": stats.ratio_of_sums(predicted / measured, np.ones(len(measured))),
        **{f"step_p{q}_ape": stats.quantile(size, q / 100) for q in (50, 90, 99)},
    }
