"""How long the blocks of a block jackknife must be, from how far the rows hang together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def block_length(series: FloatArray) -> int:
    """Rows per block, from the autocorrelation of `series`: four times the length that serves the variance best.

    b = (2 G^2 / D)^(1/3) n^(1/3), G = sum_k lambda(k/M) |k| R(k), D = 4/3 (sum_k lambda(k/M) R(k))^2, with the
    flat-top window lambda and M twice the lag after which the autocorrelation stays negligible (Politis & White
    2004, corrected by Patton, Politis & White 2009). That b minimises the mean squared error of the variance,
    which leaves too much bias for an interval: on AR(1) rows and queues 4b covers 3 to 8 points more than b, and 1 to
    4 more than 2b.

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
