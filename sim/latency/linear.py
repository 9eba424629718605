"""Integer-linear latency, the one that the oracle's driver uses; exact, for tests and for quick studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

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
