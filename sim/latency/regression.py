"""Step latency as a sum of non-negative terms: the physics of a batch with fitted prices.

    step = sum over features of coefficient * feature

Each feature is a piece of work that a step cannot avoid (DESIGN.md section 4), so a coefficient is a price:
nanoseconds per step, per token, per (query, key) pair ... and never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.pricing import Durations, OnDemand, Pricer, VectorPricer
from kvtwin.sim.latency.stats import BatchRow, BatchStats, IntArray

# Of a table of batches, or of one as plain integers: written with operators that mean the same on both.
Feature = Callable[[Any], Any]

# Where the price of a token may rise. Below some batch size a step waits for the weights, above it for the
# arithmetic (the roofline), and again where activations outgrow a cache: a price that only ever rises.
TOKEN_KNOTS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def _tokens_over(knot: int) -> Feature:
    return lambda batch: (batch.num_tokens - knot) * (batch.num_tokens > knot)


FEATURES: Final[Mapping[str, Feature]] = {
    "step": lambda batch: batch.num_decode * 0 + 1,
    "prefill_step": lambda batch: (batch.num_prefill > 0) * 1,
    "num_reqs": lambda batch: batch.num_reqs,
    "num_decode": lambda batch: batch.num_decode,
    "num_prefill": lambda batch: batch.num_prefill,
    "num_tokens": lambda batch: batch.num_tokens,
    "prefill_tokens": lambda batch: batch.prefill_tokens,
    "decode_context": lambda batch: batch.decode_context,
    "decode_context_max": lambda batch: batch.decode_context_max,
    "prefill_context": lambda batch: batch.prefill_context,
    "prefill_pairs": lambda batch: batch.prefill_pairs,
    "prefill_tokens_sq": lambda batch: batch.prefill_tokens_sq,
    **{f"tokens_over_{knot}": _tokens_over(knot) for knot in TOKEN_KNOTS},
}


def design(batches: BatchStats, names: Sequence[str]) -> FloatArray:
    """The features of n batches: float64 of shape (n, len(names))."""
    return np.column_stack([FEATURES[name](batches) for name in names]).astype(np.float64)


@dataclass(frozen=True)
class RegressionLatency:
    """Coefficients in nanoseconds per unit of each feature of `FEATURES`."""

    coefficients_ns: Mapping[str, float]

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:  # noqa: ARG002 - the contract's
        """See `LatencyModel.step_ns`."""
        # Added up feature by feature, not as a matrix product: BLAS sums in an order of its own.
        time_ns = np.zeros(len(batches))
        for name, price in self.coefficients_ns.items():
            time_ns = time_ns + price * FEATURES[name](batches)
        return np.maximum(np.rint(time_ns), 1).astype(np.int64)

    def pricer(self) -> Pricer:
        """See `pricing.pricer_for`."""
        return RegressionPricer(self) if min(self.coefficients_ns.values(), default=0.0) >= 0 else VectorPricer(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RegressionLatency:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        prices = dict(data["coefficients_ns"])
        wrong = next((name for name, price in prices.items() if type(price) not in (int, float)), None)
        if wrong is not None:
            raise ValueError(f"the price of {wrong} is {prices[wrong]!r}: a number of nanoseconds expected")
        prices = {name: float(price) for name, price in prices.items()}
        unknown = sorted(set(prices) - set(FEATURES))
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}")
        return cls(prices)

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only."""
        return {"coefficients_ns": dict(self.coefficients_ns)}


# What the features that change along a stretch of decodes grow by per step, from the number of decodes.
_GROWTH: Final[Mapping[str, Callable[[int], int]]] = {
    "decode_context": lambda num_decode: num_decode,
    "decode_context_max": lambda num_decode: 1,  # noqa: ARG005
}


class RegressionPricer:
    """Prices of `RegressionLatency` for one batch at a time, in plain floats: the same sums in the same order."""

    def __init__(self, model: RegressionLatency) -> None:
        self._model = model
        self._terms = [(price, FEATURES[name], _GROWTH.get(name)) for name, price in model.coefficients_ns.items()]
        self.needs_spread = not {"decode_context_max", "prefill_pairs", "prefill_tokens_sq"}.isdisjoint(
            model.coefficients_ns
        )

    def step_ns(self, row: tuple[int, ...], step: int) -> int:  # noqa: ARG002 - the contract's
        """See `Pricer`."""
        batch, time_ns = BatchRow(*row), 0.0
        for price, feature, _ in self._terms:
            time_ns += price * feature(batch)
        return max(round(time_ns), 1)

    def stretch(
        self,
        num_decode: int,
        context: int,
        context_sq: int,
        context_max: int,
        most: int,
        step: int,  # noqa: ARG002 - the contract's
    ) -> Durations:
        """See `Pricer`."""
        first = (num_decode, context, context_sq, context_max)
        batch = BatchRow(*first, 0, 0, 0, 0, 0)
        terms = []
        for price, feature, growth in self._terms:
            value = feature(batch)
            if value or growth:
                terms.append((price, value, growth(num_decode) if growth else 0))

        def price_one(ahead: int) -> int:
            time_ns = 0.0
            for price, value, growth in terms:
                time_ns += price * (value + growth * ahead)
            return max(round(time_ns), 1)

        return OnDemand(self._model, first, price_one, most, grows=True)
