"""How sure a difference in throughput is: of two runs of the same requests, how far one lags behind the other.

Both runs generate the same tokens, so their throughputs differ as their spans do, from the first start to the last
finish. Had the runs ended after the i-th arrival, the one would have lagged behind the other by D_i, the difference of
their last finishes up to there. D_n is what is measured; how it varies hangs on whether both keep up with arrivals.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.dependence import MeanVariance, variance_of_mean
from kvtwin.calibrate.stats import FloatArray, Interval

_MIN_REQUESTS: Final = 5
_PART: Final = 4  # the variogram is taken at a quarter of the run, and at an eighth of that
_FRACTION: Final = 8
_GROWS: Final = 0.5
_DOF: Final = 10.0


def lag_interval(start: FloatArray, measured_finish: FloatArray, simulated_finish: FloatArray) -> Interval | None:
    """The 95 % interval of the throughputs' ratio - 1: span of the measured run over span of the simulated one, less 1.

    Where a run is saturated, D is a random walk: its increments tell the variance, as the rows of any mean do. Where
    both keep up, D returns to its mean, its end is one draw from it, and its increments all but cancel. Which of the
    two it is, the variogram E (D_{i+h} - D_i)^2 of the lag about its straight line tells: it grows as h^1 for a walk
    and as h^0 for a lag that returns. Below h^0.5 the variance of D_n is half the variogram, extrapolated to h = n.

    Args:
        start: when each request starts, in the order of starting; any one unit.
        measured_finish, simulated_finish: when it is finished in either run.

    Returns:
        None for fewer than five requests.
    """
    n = len(start)
    if n < _MIN_REQUESTS:
        return None
    ends = [np.maximum.accumulate(finish) - start[0] for finish in (measured_finish, simulated_finish)]
    spans = [float(end[-1]) for end in ends]
    if min(spans) <= 0:
        return None
    value = spans[0] / spans[1] - 1
    # Each arrival's pull at log(span / span'): the increments of both, relative to what they add up to.
    shares = [np.diff(end, prepend=0.0) / span for end, span in zip(ends, spans, strict=True)]
    pull = shares[0] - shares[1]
    grows, end_variance = _variogram(np.cumsum(pull))
    if grows:
        return stats.around(1 + value, variance_of_mean(n * pull), value, is_error=True)
    return stats.around(1 + value, MeanVariance(end_variance, _DOF, float(n)), value, is_error=True)


def _variogram(lag: FloatArray) -> tuple[bool, float]:
    """Whether the lag (about its straight line) wanders, and its variance at the run's end if it does not."""
    n = len(lag)
    far = max(n // _PART, 1)
    near = max(far // _FRACTION, 1)
    if near == far:
        return True, 0.0
    # Tied down at both ends, a walk varies less by 1 - h / n.
    at_far, at_near = (float(np.mean((lag[step:] - lag[:-step]) ** 2)) / (1 - step / n) for step in (far, near))
    if at_far == 0 or at_near == 0:
        return at_far > 0, 0.0
    exponent = np.clip(np.log(at_far / at_near) / np.log(far / near), 0.0, 1.0)
    return bool(exponent > _GROWS), at_far * float((n / far) ** exponent) / 2
