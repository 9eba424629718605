"""Integer-linear latency, the one that the oracle's driver uses; exact, for tests and for quick studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvtwin.sim.latency.pricing import MAX_PRICED, Durations, Listed, Progression
from kvtwin.sim.latency.stats import BatchStats, IntArray


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """base + per_new_token * new + per_context_token * context + per_req * requests, in integer ns.

    `context` sums the tokens computed before the step over the batch (`drive_scheduler.py`, `describe`).
    """

    base_ns: int
    per_new_token_ns: int
    per_context_token_ns: int
    per_req_ns: int

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:  # noqa: ARG002 - the contract's
        """See `LatencyModel.step_ns`."""
        context = batches.decode_context + batches.prefill_context
        time = self.base_ns + self.per_new_token_ns * batches.num_tokens
        return np.maximum(time + self.per_context_token_ns * context + self.per_req_ns * batches.num_reqs, 1)

    def pricer(self) -> LinearPricer:
        """See `pricing.pricer_for`."""
        return LinearPricer(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearLatency:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        values = {name: data[name] for name in cls.__slots__}
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values.values()):
            raise ValueError("every price must be an integer number of nanoseconds, 0 or more")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only."""
        return asdict(self)


class LinearPricer:
    """Prices of `LinearLatency`, in closed form."""

    __slots__ = ("_base", "_per_context", "_per_decode", "_per_req", "_per_token", "_progression", "needs_spread")

    def __init__(self, model: LinearLatency) -> None:
        self.needs_spread = False
        self._base, self._per_token = model.base_ns, model.per_new_token_ns
        self._per_context, self._per_req = model.per_context_token_ns, model.per_req_ns
        self._per_decode = model.per_new_token_ns + model.per_req_ns
        self._progression = Progression(1, 0, 0)

    def step_ns(self, row: tuple[int, ...], step: int) -> int:  # noqa: ARG002 - the contract's
        """See `Pricer`."""
        num_decode, context, _, _, num_prefill, tokens, prefix, _, _ = row
        time = self._base + self._per_decode * num_decode + self._per_token * tokens + self._per_req * num_prefill
        time += self._per_context * (context + prefix)
        return max(1, time)

    def stretch(
        self,
        num_decode: int,
        context: int,
        context_sq: int,  # noqa: ARG002 - the contract's
        context_max: int,  # noqa: ARG002
        most: int,
        step: int,  # noqa: ARG002 - the contract's
    ) -> Durations:
        """See `Pricer`."""
        first = self._base + self._per_decode * num_decode + self._per_context * context
        if first >= 1:
            durations = self._progression
            durations.least_ns, durations.slope_ns, durations.num_steps = first, self._per_context * num_decode, most
            return durations
        # Free steps: every model's steps take at least 1 ns, so the first may stand out.
        return Listed(np.maximum(self._per_context * num_decode * np.arange(min(most, MAX_PRICED)), 1))
