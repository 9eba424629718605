"""Layers of a simulation replaced by their recording: arrivals and step times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.stats import REGIMES, BatchStats, IntArray, durations_ns
from kvtwin.traces.run import Run

_IDLE_STEPS = 2  # an engine that did nothing for this many step times was idle


def engine_arrivals(run: Run) -> IntArray:
    """When each request stood in the engine's input queue, in ns.

    `queued_ns` is when the engine's loop took it, at one of its turns; the request came some time after the turn
    before. Given that very turn, a loop that is a nanosecond ahead would make it wait for a whole step, so the middle
    between the two turns is taken; where the engine was idle, or no turns are recorded, it was taken at once.
    """
    queued: IntArray = run.requests.column("queued_ns").to_numpy()
    if not run.has("steps"):
        return queued
    turns = run.steps.column("sched_ns")
    if turns.null_count:
        turns = run.steps.column("start_ns")
    turn_ns = np.sort(turns.to_numpy())
    before = turn_ns[np.maximum(np.searchsorted(turn_ns, queued) - 1, 0)]
    waited = np.maximum(queued - before, 0)
    typical = float(np.median(durations_ns(run.steps)))
    middle: IntArray = np.where(waited > _IDLE_STEPS * typical, queued, queued - waited // 2)
    return middle


class RecordedTimes:
    """A latency model corrected by how far off it was in the recording at about that time.

    Where the simulation forms the recorded batches when they were formed, each takes exactly as long as it took. Where
    it forms others, they take what the model says of them times the factor of the nearest step of their regime: a stall
    of the machine stays where it was, and a decode does not get what the model has wrong about prefills.

    Args:
        model: the twin's.
        steps: the recording's `steps` table.
        now: the simulated clock; None to go by the number of the step instead of the time.
    """

    def __init__(self, model: LatencyModel, steps: pa.Table, now: Callable[[], int] | None = None) -> None:
        self._model, self._now = model, now
        batches, measured = BatchStats.of_steps(steps), durations_ns(steps)
        predicted = model.step_ns(batches, 0)
        self._ratio = np.where(measured > 0, measured / np.maximum(predicted, 1), 1.0)
        start_ns, regime = steps.column("start_ns").to_numpy(), batches.regime
        kinds = {name: np.flatnonzero(regime == name) for name in REGIMES}
        self._kinds = {name: _Nearest(start_ns[rows], self._ratio[rows]) for name, rows in kinds.items()}

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        """See `LatencyModel.step_ns`; where the recording has no such step, what the model says."""
        if self._now is None:
            found = self._ratio[first_step : first_step + len(batches)]
            ratio = np.concatenate([found, np.ones(len(batches) - len(found))])
        else:
            ratio = np.array([self._kinds[str(kind)].at(self._now()) for kind in batches.regime])
        times: IntArray = np.rint(self._model.step_ns(batches, first_step) * ratio).astype(np.int64)
        return np.maximum(times, 1)


class _Nearest:
    """Values at points in time, asked for at growing times: the nearest one, and none twice while others are left."""

    def __init__(self, time_ns: IntArray, values: npt.NDArray[np.float64]) -> None:
        self._time_ns, self._values, self._last = time_ns, values, -1

    def at(self, now_ns: int) -> float:
        after = int(np.searchsorted(self._time_ns, now_ns))
        before = max(after - 1, 0)
        if after == len(self._time_ns) or now_ns - self._time_ns[before] <= self._time_ns[after] - now_ns:
            after = before
        self._last = max(after, self._last + 1)
        return float(self._values[self._last]) if self._last < len(self._values) else 1.0
