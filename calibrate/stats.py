"""Error measures and their doubt: each function's docstring has its formula and where it comes from.

Every relative error is relative to the *measurement*: simulated / measured - 1. A measurement that is not
positive has no relative error; the measures give NaN there, and callers leave such rows out and say so.

One method gives every interval. A statistic is told by its *influence*: how much each row pulls at its logarithm,
one number per row (Hampel 1974; the infinitesimal jackknife). Their mean varies as the statistic does, so the variance
is that of a mean over rows that depend on their neighbours (`dependence`), and the interval is Student's on the
logarithm, where a ratio cannot become negative. Nothing is drawn: the same rows give the same interval.

Two things make an interval lopsided. A mean that few rows carry is skewed (`around`). And what a short run lacks, the
worst spells of load and the largest rows of a tail, would have moved it to one side (`Statistic.stretch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.dependence import (
    MeanVariance,
    slow_correlation,
    variance_of_mean,
)
from kvtwin.calibrate.quantiles import SmoothQuantiles
from kvtwin.traces import rng

FloatArray = npt.NDArray[np.float64]

stream = rng.stream  # one of its own for each name: one more draw shifts no other's


@dataclass(frozen=True)
class Load:
    """How busy it was at each row, told on both sides by a time that grows with it.

    Attributes:
        measured, simulated: shape (n,).
    """

    measured: FloatArray
    simulated: FloatArray

    @cached_property
    def num_seen(self) -> float:
        """How many independent loads there are: at most as many as rows."""
        return variance_of_mean(self.measured).rows

    def followed_by(self, influence: FloatArray) -> float:
        """How an influence follows the load over long stretches: the smaller correlation with the two sides' times.

        0 where it rises with the one and falls with the other: that is the noise of one side, not the load of both.
        """
        one, other = (slow_correlation(influence, times) for times in (self.measured, self.simulated))
        return min(one, other, key=abs) if one * other > 0 else 0.0


@dataclass(frozen=True)
class Statistic:
    """A number of a sample, and how each row pulls at it.

    Attributes:
        value: of the sample itself.
        level: what the interval is about, positive: 1 + value for an error, the value for a size. For a quantile it is
            the smooth estimate.
        influence: d log(level) for each row, shape (n,), mean zero; rows in the order in which they depend on one
            another (arrival, time).
        num_rows: how many of them the value rests on.
        is_error: whether the value is `level` - 1.
        quantile: which one it is; None for a mean.
        spread: how much larger the variance is than the influence shows.
        load: of the same rows, where errors may hang on it; None where not.
    """

    value: float
    level: float
    influence: FloatArray
    num_rows: int
    is_error: bool
    quantile: float | None = None
    spread: float = 1.0
    load: Load | None = None

    @cached_property
    def variance(self) -> MeanVariance:
        """Of the logarithm of `level`."""
        # Of an error: both columns have their largest rows in the same places. A size hangs on the largest alone.
        bounded = self.quantile is not None and self.is_error
        return self.scaled(variance_of_mean(self.influence, bounded=bounded))

    def scaled(self, found: MeanVariance) -> MeanVariance:
        """The variance of the influence's mean as that of `level`'s logarithm.

        A quantile is not skewed, for no row pulls at it by more than its place.
        """
        skewness = found.skewness if self.quantile is None else 0.0
        return MeanVariance(found.variance * self.spread, found.dof, found.rows, skewness)

    def stretch(self) -> tuple[float, float]:
        """By what the lower and the upper side of the interval are longer."""
        if self.load is not None:
            return self._towards_load(self.load)
        if self.quantile is not None and not self.is_error and self.quantile > 0.5:
            # A sample that lacks the largest rows shows a tail that is too short *and* varies too little.
            beyond = (1 - self.quantile) * self.variance.rows
            return 1.0, 1 + 1 / (1 + 2 * beyond)
        return 1.0, 1.0

    def _towards_load(self, load: Load) -> tuple[float, float]:
        """The same where errors may hang on the load.

        Where a request waits for those before it, busy spells are long, few and unequal, and most short runs lack the
        worst of them (Whitt 1989, "Planning queueing simulations"): such a run shows errors that are too small *and*
        vary too little, so that what misses, misses on that side. The side towards busier runs is therefore longer
        by 2 r^2 (1 - m / n): r says how the influence follows the load over long stretches, m how many independent
        loads were seen. Where the load does not depend on its neighbours, nothing changes; where errors do not hang on
        it, r is small, and longer on one side covers at most 97.5 %.
        """
        towards = load.followed_by(self.influence)
        longer = 1 + _LONGER * towards**2 * (1 - load.num_seen / len(self.influence))
        return (longer, 1.0) if towards < 0 else (1.0, longer)

    @property
    def independent_rows(self) -> float:
        """As how many independent rows the `num_rows` are as good."""
        rows = self.variance.rows if self.load is None else min(self.variance.rows, self.load.num_seen)
        # Rows that the value does not rest on (other regimes) pull at nothing, but are there: the share is that of all.
        return self.num_rows * rows / len(self.influence)


Interval = tuple[float, float]

CONFIDENCE: Final = 0.95
_MIN_ROWS: Final = 5  # of fewer rows an interval says nothing
_SAYS_NOTHING: Final = 10.0  # half an interval, in logarithms: a factor of 20,000
_FEW: Final = 20  # independent rows
_LONGER: Final = 2.0
_CLEARLY: Final = 2.0  # by as much two estimates of one variance, each from four waves, differ at random
_STRAIGHT: Final = 1e-6  # a skewness that bends nothing, but would be divided by


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


# ---- statistics, and what each row does to them --------------------------------------------------------------


def mean(values: FloatArray, rows: npt.NDArray[np.bool_] | None = None) -> Statistic:
    """The mean of sizes (not negative), of `rows` only where given; NaN without any."""
    kept = np.ones(len(values)) if rows is None else rows.astype(np.float64)
    return pooled_mean(kept * values, kept)


def pooled_mean(total: FloatArray, number: FloatArray) -> Statistic:
    """sum(total) / sum(number): the mean of sizes whose totals and numbers are known by group."""
    return _ratio(total, number, int(np.count_nonzero(number)), is_error=False)


def ratio_of_sums(top: FloatArray, bottom: FloatArray) -> Statistic:
    """sum(top) / sum(bottom) - 1: the signed bias of pairs, which is the error of their sum and mean."""
    return _ratio(top, bottom, len(top), is_error=True)


def _ratio(top: FloatArray, bottom: FloatArray, num_rows: int, *, is_error: bool) -> Statistic:
    above, below = float(top.sum()), float(bottom.sum())
    level = above / below if below > 0 else float("nan")
    influence = len(top) * (top / above - bottom / below) if level > 0 else np.zeros(len(top))
    return Statistic(level - 1 if is_error else level, level, influence, num_rows, is_error)


def quantile(values: FloatArray, q: float) -> Statistic:
    """The quantile of sizes (not negative), 0 < q < 1: Hyndman & Fan 1996, type 7 (the numpy default)."""
    return _quantiles((values,), (1,), q, float(np.quantile(values, q)), is_error=False)


def quantile_ratio(measured: FloatArray, simulated: FloatArray, q: float) -> Statistic:
    """Q_q(simulated) / Q_q(measured) - 1 of the same rows: distributions are compared, and vary as pairs do."""
    value = relative_error(float(np.quantile(measured, q)), float(np.quantile(simulated, q)))
    return or_shared(_quantiles((simulated, measured), (1, -1), q, value, is_error=True), measured, simulated)


def _quantiles(
    columns: Sequence[FloatArray], powers: Sequence[int], q: float, value: float, *, is_error: bool
) -> Statistic:
    found = SmoothQuantiles.of(columns, powers, q)
    return Statistic(value, found.level, found.influence, len(columns[0]), is_error, quantile=q, spread=found.spread)


def or_shared(own: Statistic, measured: FloatArray, simulated: FloatArray) -> Statistic:
    """An error of pairs as it varies by its own rows, or as the errors of all pairs do where that is clearly more.

    A quantile hangs on the few rows around it, and the mean latency on the longest requests. What makes all errors of a
    run larger, slowly, drowns in them, but moves them all the same. It shows in the mean logarithm of the ratios, where
    every pair counts alike.
    """
    both = (measured > 0) & (simulated > 0)
    if not both.any():
        return own
    ratios = np.log(simulated[both]) - np.log(measured[both])
    influence = np.zeros(len(both))
    influence[both] = (ratios - ratios.mean()) * len(both) / len(ratios)
    shared = replace(own, influence=influence, quantile=None, spread=1.0)
    return shared if shared.variance.variance > _CLEARLY * own.variance.variance else own


# ---- intervals -----------------------------------------------------------------------------------------------


def interval(statistic: Statistic, *, independent: bool = False) -> Interval | None:
    """The 95 % interval of a statistic.

    None where it would say nothing: no value, fewer than five rows, a variance that is hardly known.

    What such intervals cover is measured in tests/fidelity/test_coverage.py (validate/README.md has the table).

    Args:
        statistic: from this module.
        independent: whether the rows are known not to depend on one another.
    """
    if statistic.num_rows < _MIN_ROWS or not np.isfinite(statistic.value):
        return None
    found = statistic.variance
    if independent:
        found = statistic.scaled(variance_of_mean(statistic.influence, independent=True))
        return around(statistic.level, found, statistic.value, statistic.is_error, tame=True)
    plain, longer = (
        around(statistic.level, found, statistic.value, statistic.is_error, stretch)
        for stretch in ((1.0, 1.0), statistic.stretch())
    )
    # Load makes an error larger or smaller; it does not turn it round.
    turned = plain is not None and longer is not None and plain[0] * plain[1] > 0 > longer[0] * longer[1]
    return plain if turned else longer


def ratio_interval(measured: Statistic, simulated: Statistic) -> Interval | None:
    """Of simulated / measured - 1 where the two are samples of their own; `interval` says when it is None.

    The variances of two independent logarithms add up, and so do their doubts (Welch 1947).
    """
    value = relative_error(measured.value, simulated.value)
    if min(measured.num_rows, simulated.num_rows) < _MIN_ROWS or not np.isfinite(value) or not measured.level > 0:
        return None
    one, two = measured.variance, simulated.variance
    both = one.variance + two.variance
    doubt = one.variance**2 / one.dof + two.variance**2 / two.dof
    together = MeanVariance(both, both**2 / doubt if doubt > 0 else float("inf"), min(one.rows, two.rows))
    return around(simulated.level / measured.level, together, value, is_error=True)


def around(
    level: float,
    found: MeanVariance,
    value: float,
    is_error: bool,
    stretch: tuple[float, float] = (1.0, 1.0),
    *,
    tame: bool = False,
) -> Interval | None:
    """Student's interval about log(level), which holds `value` too: a smooth estimate can lie well off a quantile.

    The ends of Student's t are bent by the skewness g of the mean: t becomes ((1 + g (t - g/6))^(1/3) - 1) / (g/3)
    (Willink 2005, "A confidence interval and test for the mean of an asymmetric distribution"; the skewness adjustment
    of Skart, Tafazzoli et al. 2011, for the means of simulated queues).

    Args:
        level, value, is_error: see `Statistic`.
        found: how the logarithm of `level` varies.
        stretch: by what the lower and the upper side are longer.
        tame: take the upper end from 1 + h + h^2 / 2 instead of exp(h). It covers as often (independent rows, 8 to 100
            of them, four distributions: 92 to 96 %), and reaches a third as far where a few groups carry the mean.
    """
    from scipy.special import stdtrit  # lighter than scipy.stats, and the same function

    if found.variance == 0 or not level > 0:
        return (value, value)
    t = float(stdtrit(found.dof, (1 + CONFIDENCE) / 2))
    error = float(np.sqrt(found.variance))
    below, above = (
        longer * error * _bent(side * t, found.skewness) for side, longer in zip((1, -1), stretch, strict=True)
    )
    if not max(below, -above) < _SAYS_NOTHING:
        return None
    low = level * float(np.exp(-below)) - is_error
    high = level * (1 - above + above**2 / 2 if tame else float(np.exp(-above))) - is_error
    return (min(low, value), max(high, value))


def _bent(t: float, skewness: float) -> float:
    if abs(skewness) < _STRAIGHT:
        return t
    return float(np.cbrt(1 + skewness * (t - skewness / 6)) - 1) / (skewness / 3)


def describe(statistic: Statistic, rows: str) -> str:
    """How much its rows (called `rows`) tell, and whether that is too little for the interval to be trusted."""
    independent = statistic.independent_rows
    if interval(statistic) is None:
        few = ": too few for an interval"
    else:
        few = ": the interval may be too narrow" if independent < _FEW else ""
    return f"{statistic.num_rows} {rows}, as good as {independent:.0f} independent ones{few}"


def standard_error(values: FloatArray) -> float:
    """Of the mean of `values`, rows in the order in which they depend on one another."""
    return float(np.sqrt(variance_of_mean(values).variance))
