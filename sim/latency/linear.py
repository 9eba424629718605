"""Integer-linear latency, the one that the oracle's driver uses; exact, for tests and for quick studies."""

from __future__ import annotations

from dataclasses import dataclass

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
