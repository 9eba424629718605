"""The contract of every step-latency model: batch statistics in, integer nanoseconds out."""

from __future__ import annotations

from typing import Protocol

from kvtwin.sim.latency.stats import BatchStats, IntArray


class LatencyModel(Protocol):
    """How long the model of an engine runs for a batch."""

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        """Duration of each batch, in nanoseconds: int64 of shape (n,), every value at least 1.

        Args:
            batches: consecutive steps, or any batches where the order means nothing.
            first_step: index of the first of them in the run; only a replay of recorded times looks at it.

        The value for a batch must not depend on which other batches stand in the same call: the simulator
        asks for one step or for hundreds at once, and must get the same nanoseconds.
        """
