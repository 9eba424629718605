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
from kvtwin.sim.latency.pricing import Durations, Pricer, VectorPricer, decode_batches
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
        prices = {name: float(value) for name, value in data["coefficients_ns"].items()}
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
_FEW = 32  # so many steps are quicker priced one by one than in a vectorised call


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
        batch = BatchRow(num_decode, context, context_sq, context_max, 0, 0, 0, 0, 0)
        terms = []
        for price, feature, growth in self._terms:
            value = feature(batch)
            if value or growth:
                terms.append((price, value, growth(num_decode) if growth else 0))
        return _Decodes(self._model, batch, terms, most)


class _Decodes:
    """Durations of decode steps, priced as far as they are asked for; see `pricing.Durations`."""

    __slots__ = ("_batch", "_known_ns", "_model", "_terms", "num_steps")

    def __init__(
        self, model: RegressionLatency, batch: BatchRow, terms: list[tuple[float, int, int]], num_steps: int
    ) -> None:
        self._model, self._batch, self._terms, self.num_steps = model, batch, terms, num_steps
        self._known_ns: list[int] = []

    @property
    def least_ns(self) -> int:
        """The first: contexts only grow, and no price is negative."""
        return self.last_ns(1)

    def _price(self, count: int) -> list[int]:
        known, terms = self._known_ns, self._terms
        for ahead in range(len(known), min(count, _FEW)):
            time_ns = 0.0
            for price, value, growth in terms:
                time_ns += price * (value + growth * ahead)
            known.append(max(round(time_ns), 1))
        while len(known) < count:
            ahead, first = len(known), self._batch
            context_sq = first.decode_context_sq + (2 * first.decode_context + first.num_decode * ahead) * ahead
            context = first.decode_context + first.num_decode * ahead
            start = (first.num_decode, context, context_sq, first.decode_context_max + ahead)
            batches = decode_batches(start, min(8 * _FEW, self.num_steps - ahead))
            known += self._model.step_ns(batches, 0).tolist()
        return known

    def total_ns(self, count: int) -> int:
        """See `Durations`."""
        return sum(self._price(count)[:count])

    def reach(self, time_ns: int, gap_ns: int, most: int) -> tuple[int, int]:
        """See `Durations`."""
        known, total_ns = self._known_ns, 0
        for count in range(1, most + 1):
            if count > len(known):
                self._price(count)
            total_ns += known[count - 1]
            if total_ns + count * gap_ns >= time_ns:
                return count, total_ns
        return most, total_ns

    def last_ns(self, count: int) -> int:
        """See `Durations`."""
        return self._price(count)[count - 1]

    def list_ns(self, count: int) -> IntArray:
        """See `Durations`."""
        return np.array(self._price(count)[:count], dtype=np.int64)
