"""Error measures and their doubt: each function's docstring has its formula and where it comes from.

Every relative error is relative to the *measurement*: simulated / measured - 1. A measurement that is not
positive has no relative error; the measures give NaN there, and callers leave such rows out and say so.

The intervals are block bootstraps, because neighbours in a queue share their fate: a late request makes the
next one late, so resampling single requests would claim far more evidence than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.resamples import Resamples, running_total
from kvtwin.traces import rng

FloatArray = npt.NDArray[np.float64]

stream = rng.stream  # one of its own for each name: one more metric shifts no other's interval


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number of a sample, and the same number of its resamples.

    Attributes:
        value: of the sample itself.
        resampled: its values, shape (resamples,).
    """

    value: float
    resampled: Callable[[Resamples], FloatArray]


Interval = tuple[float, float]

MAX_RESAMPLES: Final = 1000
MIN_RESAMPLES: Final = 200
_MAX_DRAWS: Final = 200_000_000  # resamples x n of one bootstrap: bounds its time for runs of a million steps
_MIN_ROWS: Final = 5  # the bootstrap of fewer rows only repeats them
_MIN_ERROR: Final = -1 + 1e-12  # a ratio of 0 has no logarithm
_STANDARD_ERROR_RESAMPLES: Final = 500
_NO_SHARE: Final = 1e-9  # of the Harrell-Davis weight: what is left out
_REACH: Final = 8.0  # ranks looked at about a quantile, in sqrt(n); more where resamples vary more
_CHUNK_DRAWS: Final = 500_000  # resamples x n in memory at once (4 MB of weights: stays in the cache)


def relative_error(measured: float, simulated: float) -> float:
    """simulated / measured - 1; NaN where measured <= 0.

    >>> round(relative_error(200.0, 190.0), 12)
    -0.05
    """
    return simulated / measured - 1 if measured > 0 else float("nan")


def relative_errors(measured: FloatArray, simulated: FloatArray) -> FloatArray:
    """simulated / measured - 1 of each pair; NaN where measured <= 0."""
    ratio: FloatArray = np.full(len(measured), np.nan)
    np.divide(simulated, measured, out=ratio, where=measured > 0)
    return ratio - 1


def mape(measured: FloatArray, simulated: FloatArray) -> float:
    """Mean absolute percentage error, as a fraction: mean |simulated_i / measured_i - 1|.

    Relative to the measurement, never to the prediction or the mean of both (Hyndman & Koehler 2006,
    "Another look at measures of forecast accuracy", section 2.2). It punishes predicting too much harder than
    predicting too little (at most 100 %), so read it beside a signed bias.

    >>> round(mape(np.array([100.0, 200.0]), np.array([110.0, 160.0])), 12)
    0.15
    """
    return float(np.mean(np.abs(relative_errors(measured, simulated))))


# ---- statistics: what a resample does to a number ------------------------------------------------------------


def _statistic(resampled: Callable[[Resamples], FloatArray], n: int) -> Statistic:
    """One whose value is that of every row drawn once."""
    return Statistic(float(resampled(Resamples.whole(n))[0]), resampled)


def mean(values: FloatArray, rows: npt.NDArray[np.bool_] | None = None) -> Statistic:
    """The mean, of `rows` only where given; NaN for a resample that drew none of them."""
    kept = np.ones(len(values)) if rows is None else rows.astype(np.float64)
    total, number = running_total(kept * values), running_total(kept)
    return _statistic(lambda drawn: _divide(drawn.totals(total), drawn.totals(number)), len(values))


def ratio_of_sums(top: FloatArray, bottom: FloatArray) -> Statistic:
    """sum(top) / sum(bottom) - 1: the signed bias of pairs, which is the error of their sum and mean."""
    above, below = running_total(top), running_total(bottom)
    return _statistic(lambda drawn: _divide(drawn.totals(above), drawn.totals(below)) - 1, len(top))


def quantile(values: FloatArray, q: float) -> Statistic:
    """The quantile, 0 < q < 1: Hyndman & Fan 1996, type 7 (the numpy default); resampled, the Harrell-Davis estimate.

    A bootstrapped order statistic jumps from one drawn value to the next. In a ratio of two strongly correlated
    samples these jumps are most of what the bootstrap sees, and its intervals come out too wide (99 to 100 % coverage
    for nominal 95 %). Harrell & Davis 1982 average the order statistics with the weights of Beta((n + 1) q,
    (n + 1) (1 - q)), which is smooth, and the same quantile for large n.
    """
    return Statistic(float(np.quantile(values, q)), _harrell_davis(values, q))


def quantile_ratio(measured: FloatArray, simulated: FloatArray, q: float) -> Statistic:
    """Q_q(simulated) / Q_q(measured) - 1, both over the same drawn rows: distributions are compared, not pairs."""
    top, bottom = quantile(simulated, q), quantile(measured, q)
    return Statistic(
        relative_error(bottom.value, top.value),
        lambda drawn: _divide(top.resampled(drawn), bottom.resampled(drawn)) - 1,
    )


def _harrell_davis(values: FloatArray, q: float) -> Callable[[Resamples], FloatArray]:
    n = len(values)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    share = _beta_shares(n, q)
    first_count, last_count = np.searchsorted(share, [_NO_SHARE, 1 - _NO_SHARE])

    @lru_cache(maxsize=2)
    def window(reach: int) -> tuple[int, int, FloatArray]:
        low, high = max(0, int(q * n) - reach), min(n, int(q * n) + reach)
        is_below = np.zeros(n)
        is_below[order[:low]] = 1
        return low, high, running_total(is_below)

    def resampled(drawn: Resamples) -> FloatArray:
        # How many draws lie at or below each rank, for the ranks about the quantile: the others have no share.
        reach = int(_REACH * np.sqrt(n)) + 1
        while True:
            low, high, is_below = window(reach)
            below = drawn.totals(is_below)
            counts = below[:, None] + np.cumsum(drawn.weights[:, order[low:high]], axis=1)
            if (low == 0 or below.max() <= first_count) and (high == n or counts[:, -1].min() >= last_count):
                break
            reach *= 2
        shares = np.diff(share[counts.astype(np.int64)], axis=1, prepend=share[below.astype(np.int64)][:, None])
        return _divide(shares @ ranked[low:high], shares.sum(axis=1))

    return resampled


def _beta_shares(n: int, q: float) -> FloatArray:
    """Share of the Harrell-Davis weight that lies at or below count 0 .. n."""
    from scipy.special import betainc  # lighter than scipy.stats, and the same function

    shares: FloatArray = betainc((n + 1) * q, (n + 1) * (1 - q), np.arange(n + 1) / n)
    return shares


def _divide(top: FloatArray, bottom: FloatArray) -> FloatArray:
    out: FloatArray = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=out, where=bottom > 0)
    return out


# ---- the block bootstrap -------------------------------------------------------------------------------------


def block_length(series: FloatArray) -> int:
    """Rows per block, from the autocorrelation of `series`: four times the length that serves the variance best.

    b = (2 G^2 / D)^(1/3) n^(1/3), G = sum_k lambda(k/M) |k| R(k), D = 4/3 (sum_k lambda(k/M) R(k))^2, with the
    flat-top window lambda and M twice the lag after which the autocorrelation stays negligible (Politis & White
    2004, corrected by Patton, Politis & White 2009). That b minimises the mean squared error of the variance,
    which leaves too much bias for an interval: on AR(1) rows and queues 4b covers 3 to 8 points more than b, and 1 to
    4 more than 2b (tests/fidelity/test_coverage.py).

    Returns:
        At most n / 5, so that a sample has five blocks, and at least the cube root of n: in few rows the
        autocorrelation drowns in noise, and for independent rows such blocks cost nothing. 1 for fewer than ten rows
        and for rows that are all alike.
    """
    n = len(series)
    centred = series - series.mean()
    covariance = _autocovariance(centred)
    limit = n // 5
    least = min(limit, int(np.ceil(n ** (1 / 3))))
    if limit < 2 or not covariance[0] > 0:
        return 1
    lag = _last_lag(covariance / covariance[0], n)
    lags = np.arange(min(2 * lag, n - 1) + 1)
    kept = np.minimum(1.0, 2 * (1 - lags / max(2 * lag, 1))) * covariance[: len(lags)]
    moment, spectrum = 2 * float(lags @ kept), 2 * float(kept.sum()) - float(kept[0])
    if spectrum <= 0:  # rows that alternate: the estimate breaks down, and long blocks are the safe side
        return limit
    shortest = np.ceil((1.5 * moment**2 / spectrum**2 * n) ** (1 / 3))
    return int(np.clip(4 * shortest, least, limit)) if lag else least


def _autocovariance(centred: FloatArray) -> FloatArray:
    """R(k) = 1/n sum_i x_i x_(i+k), all lags at once."""
    n = len(centred)
    spectrum = np.fft.rfft(centred, 2 * n)
    return np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n] / n


def _last_lag(correlation: FloatArray, n: int) -> int:
    """Smallest m such that the next `run` correlations are all within 2 sqrt(log10(n) / n)."""
    run = max(5, int(np.ceil(np.sqrt(np.log10(n)))))
    limit = int(np.ceil(np.sqrt(n))) + run
    large = np.flatnonzero(np.abs(correlation[1 : limit + 1]) > 2 * np.sqrt(np.log10(n) / n)) + 1
    last = 0
    for lag in large:
        if lag > last + run:
            break
        last = int(lag)
    return last


def num_resamples(n: int) -> int:
    """1000, and fewer (at least 200) for samples so large that 1000 would take minutes."""
    return int(np.clip(_MAX_DRAWS // max(n, 1), MIN_RESAMPLES, MAX_RESAMPLES))


def standard_error(values: FloatArray, rng: np.random.Generator) -> float:
    """Of the mean of `values`, rows in the order in which they depend on one another: from resampled blocks."""
    n = len(values)
    drawn = Resamples.draw(n, block_length(values), _STANDARD_ERROR_RESAMPLES, rng)
    return float(np.std(drawn.totals(running_total(values)) / n))


def bootstrap(
    n: int,
    length: int,
    statistics: Mapping[str, Statistic],
    rng: np.random.Generator,
    *,
    resamples: int | None = None,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Intervals of several statistics from the same resamples: percentiles, widened for few blocks.

    The percentile interval (Efron & Tibshirani 1993, chapter 13), stretched about the statistic by
    t(n/length - 1) / z, Student's quantile over the normal one, and by 1 / sqrt(1 - length/n), the known shortfall
    of the block bootstrap's variance (Lahiri 2003, chapter 5), on the scale of log(1 + error), where a ratio cannot
    become negative. Neither matters for many blocks. What the 95 % intervals cover is measured in
    tests/fidelity/test_coverage.py: 92 to 99 % from 300 rows on, independent or AR(1) up to rho 0.9 and for queues at
    half load; less where a sample holds only a few busy periods of a loaded queue (84 to 95 % for 300 requests at load
    0.8), and for the p99 of 100 rows (89 to 92 %). The bias-corrected percentile was tried: it covers quantiles worse.

    Args:
        n: rows of the sample, in the order in which they depend on one another (arrival, time).
        length: rows per block (`block_length`).
        statistics: by name; relative errors or sizes, so never below -1.
        resamples: how many; default `num_resamples(n)`.
        confidence: of the interval.

    Returns:
        (low, high) per name; (NaN, NaN) where the statistic has no value.
    """
    drawn = _resample(n, length, statistics, rng, resamples or num_resamples(n))
    stretch = _few_blocks(n, length, confidence)
    return {
        name: _interval(values, statistics[name].value, _smooth(statistics[name], n), stretch, confidence)
        for name, values in drawn.items()
    }


def bootstrap_ratios(
    measured: Mapping[str, Statistic],
    simulated: Mapping[str, Statistic],
    sizes: tuple[int, int],
    lengths: tuple[int, int],
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Intervals of simulated / measured - 1 where the two are samples of their own: each is resampled by itself.

    Args:
        measured, simulated: the same statistics of both samples, by name; positive.
        sizes, lengths: rows and rows per block of the two.
        rng, confidence: see `bootstrap`; the stretch is that of the sample with fewer blocks.
    """
    total = num_resamples(max(sizes))
    one, two = (
        _resample(n, length, statistics, rng, total)
        for n, length, statistics in zip(sizes, lengths, (measured, simulated), strict=True)
    )
    stretch = max(_few_blocks(n, length, confidence) for n, length in zip(sizes, lengths, strict=True))
    found = {}
    for name in measured:
        value = relative_error(measured[name].value, simulated[name].value)
        smooth = relative_error(_smooth(measured[name], sizes[0]), _smooth(simulated[name], sizes[1]))
        found[name] = _interval(_divide(two[name], one[name]) - 1, value, smooth, stretch, confidence)
    return found


def _resample(
    n: int, length: int, statistics: Mapping[str, Statistic], rng: np.random.Generator, total: int
) -> dict[str, FloatArray]:
    """The statistics of `total` resamples."""
    rows = max(1, _CHUNK_DRAWS // n)
    parts: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for first in range(0, total, rows):
        drawn = Resamples.draw(n, length, min(rows, total - first), rng)
        for name, statistic in statistics.items():
            parts[name].append(statistic.resampled(drawn))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _smooth(statistic: Statistic, n: int) -> float:
    """What resamples estimate: the statistic itself, but for a quantile its smooth estimate."""
    return float(statistic.resampled(Resamples.whole(n))[0])


def _few_blocks(n: int, length: int, confidence: float) -> float:
    from scipy.special import ndtri, stdtrit  # lighter than scipy.stats, and the same functions

    upper = (1 + confidence) / 2
    blocks = n / length
    student = float(stdtrit(max(blocks - 1, 1), upper) / ndtri(upper))
    return student / float(np.sqrt(1 - length / n)) if length < n else student


def _interval(values: FloatArray, value: float, smooth: float, stretch: float, confidence: float) -> Interval:
    finite = values[np.isfinite(values)]
    if not finite.size or not np.isfinite(value):
        return (float("nan"), float("nan"))
    ends = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    centre, low, high = np.log1p(np.maximum([smooth, *ends], _MIN_ERROR))
    low, high = np.expm1(centre + stretch * (low - centre)), np.expm1(centre + stretch * (high - centre))
    # In a handful of rows the smooth estimate of a quantile can lie well off the quantile itself.
    return (min(float(low), value), max(float(high), value))


def usable(interval: Interval, n: int, *, size: bool = False) -> Interval | None:
    """An interval as a Check carries it: None where it says nothing (no value, or fewer than five rows).

    Args:
        interval: from `bootstrap`.
        n: rows that the statistic rests on.
        size: whether it is of a size, such as a MAPE: what the widening put below zero is cut off.
    """
    low, high = interval
    if n < _MIN_ROWS or not np.isfinite(interval).all():
        return None
    return (max(low, 0.0) if size else low, high)
