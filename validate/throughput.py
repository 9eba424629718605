"""How sure a difference in throughput is: of two runs of the same requests, how far one lags behind the other.

Both runs generate the same tokens, so their throughputs differ as their spans do, from the first start to the last
finish. Had the runs ended after the i-th arrival, the one would have lagged behind the other by D_i, the difference of
their last finishes up to there. D_n is what is measured; how it varies hangs on whether both keep up with arrivals.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.dependence import MeanVariance, correlation_of_neighbours, variance_of_mean
from kvtwin.calibrate.stats import FloatArray, Interval

_MIN_REQUESTS: Final = 5
_PART: Final = 4  # the variogram is taken at a quarter of the run, and at an eighth of that
_FRACTION: Final = 8
_GROWS: Final = 0.4
_STARTS: Final = 8  # an eighth of the run is left to the lag to come to where it returns to
_END_DOF: Final = 10.0


def lag_interval(start: FloatArray, measured_finish: FloatArray, simulated_finish: FloatArray) -> Interval | None:
    """The 95 % interval of the throughputs' ratio - 1: span of the measured run over span of the simulated one, less 1.

    Where a run is saturated, D wanders: its increments tell the variance, as the rows of any mean do. Where both keep
    up, D returns to where it was, its end is one draw from it, and its increments all but cancel. Which of the two it
    is, the variogram E (D_{i+h} - D_i)^2 tells: it grows as h^2 where one falls behind steadily, as h^1 for a walk and
    as h^0 for a lag that returns; the line between them is drawn at h^0.4.

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
    # Each arrival's pull at log(span / span'): the increments of both, relative to what they add up to.
    shares = [np.diff(end, prepend=0.0) / span for end, span in zip(ends, spans, strict=True)]
    pull = shares[0] - shares[1]
    lag = (ends[0] - ends[1]) / spans[1]
    if not _wanders(lag):
        return _returning(lag[n // _STARTS :])
    value = float(lag[-1])
    return stats.around(1 + value, _wandering(n * pull, np.cumsum(pull)), value, is_error=True)


def _returning(lag: FloatArray) -> Interval:
    """What is left of the last lag when the place to which it returns is taken off, anywhere within 95 % of its rows.

    They are as few independent draws as their correlation says, k: the ends are moved out by Student's t over the
    normal's, and by sqrt(1 + 1 / k) for a draw to come (a prediction interval).
    """
    from scipy.special import ndtri, stdtrit

    rho = float(np.clip(correlation_of_neighbours(lag), 0.0, 1 - 1 / np.sqrt(len(lag))))
    draws = max(len(lag) * (1 - rho) / (1 + rho), 1.0)
    upper = (1 + stats.CONFIDENCE) / 2
    longer = float(stdtrit(draws, upper) / ndtri(upper)) * float(np.sqrt(1 + 1 / draws))
    low, middle, high = np.quantile(lag, [1 - upper, 0.5, upper])
    value = float(lag[-1])
    ends = [value - float(middle + longer * (end - middle)) for end in (high, low)]
    return min(ends[0], value), max(ends[1], value)


def _wandering(pull: FloatArray, line: FloatArray) -> MeanVariance:
    """How the mean of all pulls varies: as their sum wanders, and as its end is one draw from what lies on top.

    The variogram of a walk and something that returns is 2 c + s h, about its straight `line`; c is the variance of the
    latter.
    """
    walk = variance_of_mean(pull)
    far, near = _steps(len(line))
    # Tied down at both ends, a walk varies less by 1 - h / n.
    at_far, at_near = (_variogram(line, step) / (1 - step / len(line)) for step in (far, near))
    end = max(at_near - near / far * at_far, 0.0) / (2 * (1 - near / far)) if near < far else 0.0
    both = walk.variance + end
    if both == 0:
        return walk
    dof = both**2 / (walk.variance**2 / walk.dof + end**2 / _END_DOF)  # Satterthwaite 1946
    return MeanVariance(both, dof, walk.rows, walk.skewness * (walk.variance / both) ** 1.5)


def _wanders(lag: FloatArray) -> bool:
    """Whether the lag does not return to where it was."""
    far, near = _steps(len(lag))
    at_far, at_near = _variogram(lag, far), _variogram(lag, near)
    if near == far or at_near == 0:
        return at_far > 0
    return bool(at_far > at_near * (far / near) ** _GROWS)


def _steps(n: int) -> tuple[int, int]:
    far = max(n // _PART, 1)
    return far, max(far // _FRACTION, 1)


def _variogram(lag: FloatArray, step: int) -> float:
    return float(np.mean((lag[step:] - lag[:-step]) ** 2))
