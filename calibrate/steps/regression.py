"""Step latency as a sum of priced features: the feature sets, simplest first, and the fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.robust import fit_nonnegative, fit_with_speeds
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.regression import FEATURES, TOKEN_KNOTS, RegressionLatency, design
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.traces.errors import InputError, KvtwinError

# What each set adds to the one before it, simplest first; the last one holds every feature.
_GROWTH: Final[Mapping[str, tuple[str, ...]]] = {
    "tokens": ("step", "num_tokens"),
    "context": ("decode_context",),
    "work": ("num_reqs", "prefill_pairs"),
    "roofline": ("prefill_step", *(f"tokens_over_{knot}" for knot in TOKEN_KNOTS)),
    "everything": tuple(FEATURES),
}


def _nested() -> dict[str, tuple[str, ...]]:
    sets: dict[str, tuple[str, ...]] = {}
    grown: tuple[str, ...] = ()
    for name, more in _GROWTH.items():
        grown = sets[name] = tuple(dict.fromkeys((*grown, *more)))
    return sets


FEATURE_SETS: Final[Mapping[str, tuple[str, ...]]] = _nested()


class NotFittedError(KvtwinError):
    """A `StepRegression` was asked for coefficients before `fit`."""


class StepRegression:
    """Step latency as a sum of features, each with a price that is never negative.

        latency_ns = sum over features of coefficient * feature

    The fit is `robust.fit_nonnegative`: towards the mean latency, with bounded influence of stalls.

    Args:
        features: names out of `sim.latency.regression.FEATURES`.

    Attributes:
        coefficients_ns_: after `fit`: nanoseconds per unit of each feature, in the order of `features`.

    >>> batches = BatchStats(np.array([[n, 100 * n, 0, 100, 0, 0, 0, 0, 0] for n in range(1, 60)]))
    >>> fitted = StepRegression(["step", "num_reqs"]).fit(batches, 5000 + 20 * batches.num_reqs)
    >>> fitted.coefficients_ns_.round(6).tolist()
    [5000.0, 20.0]
    """

    def __init__(self, features: Sequence[str]) -> None:
        self.features = tuple(features)

    def fit(self, batches: BatchStats, latency_ns: npt.ArrayLike, day: IntArray | None = None) -> StepRegression:
        """Find the prices.

        Args:
            batches: n batches.
            latency_ns: how long each took, shape (n,), positive.
            day: which recording each comes from, shape (n,): its speed is then a parameter of its own, and the prices
                are those of the recordings' mean speed (`robust.fit_with_speeds`).

        Raises:
            InputError: an unknown feature.
            ValueError: a latency is not positive and finite, or not one per batch.
        """
        times = np.asarray(latency_ns, np.float64)
        if times.shape != (len(batches),) or not np.all((times > 0) & np.isfinite(times)):
            raise ValueError("one positive latency per batch expected")
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown:
            raise InputError(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
        columns = design(batches, self.features)
        self._found = fit_nonnegative(columns, times) if day is None else fit_with_speeds(columns, times, day)[0]
        return self

    @property
    def coefficients_ns_(self) -> FloatArray:
        """Nanoseconds per unit of each feature. Raises NotFittedError before `fit`."""
        try:
            return self._found
        except AttributeError:
            raise NotFittedError("this StepRegression has no coefficients yet: call fit(batches, latency_ns)") from None

    def to_latency(self) -> RegressionLatency:
        """The latency model of the features that cost something. Raises NotFittedError before `fit`."""
        prices = zip(self.features, self.coefficients_ns_.tolist(), strict=True)
        return RegressionLatency({name: price for name, price in prices if price > 0})
