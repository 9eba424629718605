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
from kvtwin.sim.latency.stats import BatchStats, IntArray

Feature = Callable[[BatchStats], IntArray]

# Where the price of a token may rise. Below some batch size a step waits for the weights, above it for the
# arithmetic (the roofline), and again where activations outgrow a cache: a price that only ever rises.
TOKEN_KNOTS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def _tokens_over(knot: int) -> Feature:
    return lambda batches: np.maximum(batches.num_tokens - knot, 0)


FEATURES: Final[Mapping[str, Feature]] = {
    "step": lambda batches: np.ones(len(batches), dtype=np.int64),
    "prefill_step": lambda batches: np.minimum(batches.num_prefill, 1),
    "num_reqs": lambda batches: batches.num_reqs,
    "num_decode": lambda batches: batches.num_decode,
    "num_prefill": lambda batches: batches.num_prefill,
    "num_tokens": lambda batches: batches.num_tokens,
    "prefill_tokens": lambda batches: batches.prefill_tokens,
    "decode_context": lambda batches: batches.decode_context,
    "decode_context_max": lambda batches: batches.decode_context_max,
    "prefill_context": lambda batches: batches.prefill_context,
    "prefill_pairs": lambda batches: batches.prefill_pairs,
    "prefill_tokens_sq": lambda batches: batches.prefill_tokens_sq,
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
