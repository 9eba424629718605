"""One engine instance on a virtual clock: arrivals, schedule, latency, update. The plain path.

Follows vLLM's `EngineCore.run_busy_loop` with `step` (synchronous) or `step_with_batch_queue` (asynchronous
scheduling: two batches in flight, the next one scheduled before the previous one's tokens are known).
This one-step-at-a-time loop is the specification: any faster path must equal it bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kvtwin.sim.config import VllmConfig
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.recorder import RequestTimes, StepLog
from kvtwin.sim.request import Request
from kvtwin.sim.schedulers.plan import StepPlan
from kvtwin.sim.schedulers.vllm import VllmScheduler
from kvtwin.traces.errors import KvtwinError


@dataclass(slots=True)
class _InFlight:
    """A scheduled batch whose tokens have not been taken in yet."""

    plan: StepPlan
    sched_ns: int
    start_ns: int
    end_ns: int


class Engine:
    """Serves requests with one vLLM engine.

    Args:
        config: the engine's settings.
        latency: how long the model runs for a batch.
        host: time between steps.
        record_steps: keep a row per step.
    """

    def __init__(
        self,
        config: VllmConfig,
        latency: LatencyModel,
        host: HostTime | None = None,
        *,
        record_steps: bool = True,
    ) -> None:
        self._latency, self._host = latency, host or HostTime()
        self._depth = 2 if config.async_scheduling else 1
        self._scheduler = VllmScheduler(config)
        self._log = StepLog() if record_steps else None
        self._now_ns = 0
        self._device_free_ns = 0
        self.num_steps = 0

    def run(self, requests: Sequence[Request]) -> RequestTimes:
        """Serve `requests`, sorted by arrival, to the last token.

        Raises:
            KvtwinError: a waiting request can never be scheduled.
        """
        arrivals = deque(requests)
        times = RequestTimes(len(requests))
        in_flight: deque[_InFlight] = deque()
        while True:
            self._add_arrived(arrivals, times)
            executed = preempted = False
            if self._scheduler.has_requests:
                batch = self._schedule(times)
                executed, preempted = not batch.plan.is_empty, bool(batch.plan.preempted)
                in_flight.append(batch)
                if len(in_flight) < self._depth and executed:
                    continue  # step_with_batch_queue: fill the queue first
            if in_flight:
                self._update(in_flight.popleft(), times)
            if not (executed or preempted or in_flight) and not self._wait(arrivals):
                return times

    def steps(self) -> pa.Table:
        """The `steps` table of what was run. Only with `record_steps`."""
        assert self._log is not None, "steps were not recorded"
        return self._log.table()

    def _add_arrived(self, arrivals: deque[Request], times: RequestTimes) -> None:
        while arrivals and arrivals[0].arrival_ns <= self._now_ns:
            request = arrivals.popleft()
            times.queued[request.row] = self._now_ns
            self._scheduler.add(request)

    def _schedule(self, times: RequestTimes) -> _InFlight:
        plan = self._scheduler.schedule()
        sched_ns = self._now_ns
        if plan.is_empty:  # takes no time; it still has its place in the queue of batches
            return _InFlight(plan, sched_ns, sched_ns, sched_ns)
        times.note_plan(plan, sched_ns)
        batch = BatchStats.of_batch(plan.cache_lens, plan.input_lens)
        duration_ns = int(self._latency.step_ns(batch, self.num_steps)[0])
        self._now_ns += self._host.schedule(len(plan.requests))
        start_ns = max(self._now_ns, self._device_free_ns)
        self._device_free_ns = start_ns + duration_ns + self._host.gap_ns
        self.num_steps += 1
        return _InFlight(plan, sched_ns, start_ns, start_ns + duration_ns)

    def _update(self, batch: _InFlight, times: RequestTimes) -> None:
        """The batch has run: advance the clock and feed its tokens back."""
        plan = batch.plan
        if plan.is_empty:
            return
        self._now_ns = max(self._now_ns, batch.end_ns) + self._host.update(len(plan.requests))
        finished = self._scheduler.update(plan)
        times.note_tokens(plan, finished, self._now_ns)
        if self._log is not None:
            self._log.add(plan, finished, (batch.sched_ns, batch.start_ns, batch.end_ns, self._now_ns))

    def _wait(self, arrivals: deque[Request]) -> bool:
        """Nothing can run: move the clock to the next arrival; False when everything is done."""
        if not arrivals:
            if self._scheduler.has_unfinished:
                raise KvtwinError("waiting requests can never be scheduled: the KV cache is too small for them")
            return False
        if not self._scheduler.has_requests or self._scheduler.has_unfinished:
            self._now_ns = max(self._now_ns, arrivals[0].arrival_ns)
        return True
