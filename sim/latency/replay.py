"""Step latencies replayed from a recording: what the twin does when its latency model is beyond doubt."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kvtwin.sim.latency.stats import BatchStats, IntArray, durations_ns
from kvtwin.traces.errors import InputError


class ReplayLatency:
    """Step i takes as long as step i of a recording took.

    Args:
        steps: a `steps` table (schema.STEPS), in order.
    """

    def __init__(self, steps: pa.Table) -> None:
        self._duration_ns: IntArray = np.maximum(durations_ns(steps), 1)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        """See `LatencyModel.step_ns`.

        Raises:
            InputError: the simulated run needs more steps than were recorded.
        """
        last = first_step + len(batches)
        if last > len(self._duration_ns):
            raise InputError(f"step {last - 1} has no recorded time: the recording has {len(self._duration_ns)} steps")
        durations: IntArray = self._duration_ns[first_step:last]
        return durations
