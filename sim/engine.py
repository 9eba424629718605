"""One engine instance on a virtual clock: arrivals, schedule, latency, update.

Follows vLLM's `EngineCore.run_busy_loop` with `step` (synchronous) or `step_with_batch_queue` (asynchronous
scheduling: two batches in flight, the next one scheduled before the previous one's tokens are known).
This one-step-at-a-time loop is the specification. Steps that change nothing but counters are taken many at a time
(`stretch.py`), with the same result bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kvtwin.sim import stretch
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
        plain: take every step by itself, however alike they are.
    """

    def __init__(
        self,
        config: VllmConfig,
        latency: LatencyModel,
        host: HostTime | None = None,
        *,
        record_steps: bool = True,
        plain: bool = False,
    ) -> None:
        self._plain = plain
        self._latency, self._host = latency, host or HostTime()
        self._depth = 2 if config.async_scheduling else 1
        self._scheduler = VllmScheduler(config)
        self._log = StepLog() if record_steps else None
        self._now_ns = 0
        self._device_free_ns = 0
        # Every step computes a token, so a cache full of them takes no more steps than this to reach a new one.
        self._max_fruitless = 2 * config.capacity_tokens
        self._fruitless = 0
        self.num_steps = 0

    def run(self, requests: Sequence[Request]) -> RequestTimes:
        """Serve `requests`, sorted by arrival, to the last token.

        Raises:
            KvtwinError: a waiting request can never be scheduled, or preemptions undo one another for ever.
        """
        arrivals = deque(requests)
        times = RequestTimes(len(requests))
        in_flight: deque[_InFlight] = deque()
        while True:
            self._add_arrived(arrivals, times)
            if not self._plain and self._stretch(arrivals, times, in_flight):
                continue
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
        self._refuse_livelock(plan)
        if plan.is_empty:
            return
        self._now_ns = max(self._now_ns, batch.end_ns) + self._host.update(len(plan.requests))
        finished = self._scheduler.update(plan)
        times.note_tokens(plan, finished, self._now_ns)
        if self._log is not None:
            self._log.add(plan, finished, (batch.sched_ns, batch.start_ns, batch.end_ns, self._now_ns))

    def _refuse_livelock(self, plan: StepPlan) -> None:
        """vLLM can preempt the same requests over and over, each time before one of them has a new token: with the
        priority policy and equal (priority, arrival), the victim is the first of the running list."""
        self._fruitless = 0 if any(plan.samples) else self._fruitless + 1
        if self._fruitless > self._max_fruitless:
            raise KvtwinError(
                f"no request has got a token for {self._fruitless} steps: preemptions undo one another, as they do in "
                "vLLM; give the KV cache more blocks, or let admissions reserve whole sequences"
            )

    def _stretch(self, arrivals: deque[Request], times: RequestTimes, in_flight: deque[_InFlight]) -> bool:
        """Take as many alike decode steps as there are; False if there are too few to be worth it.

        Under asynchronous scheduling the step in flight is taken in with the stretch, and its last step stays in
        flight: every step is scheduled one step before the tokens it follows are known.
        """
        depth, scheduler = self._depth, self._scheduler
        if len(in_flight) != depth - 1 or not stretch.follows((batch.plan for batch in in_flight), scheduler.running):
            return False
        most = stretch.num_steady_steps(scheduler)
        if not most:
            return False
        running = scheduler.running
        latencies_ns = self._latency.step_ns(stretch.batches(running, most), self.num_steps).tolist()
        arrival_ns = arrivals[0].arrival_ns if arrivals else None
        line = self._timeline(latencies_ns, in_flight[0].end_ns if in_flight else None, arrival_ns)
        cache_lens = [request.num_computed_tokens for request in running]
        use = stretch.advance(scheduler, len(line))
        steps = stretch.Steps(tuple(running), cache_lens, len(scheduler.waiting), use)
        self.num_steps += len(line)
        self._fruitless = 0
        self._take_in(steps, line, in_flight, times)
        return True

    def _timeline(
        self, latencies_ns: list[int], in_flight_end_ns: int | None, arrival_ns: int | None
    ) -> list[tuple[int, int, int, int]]:
        """Run the clock over alike steps, up to the first after which an arrival is seen.

        Returns:
            (sched, start, end, now) of each step, in ns; `now` is when the loop goes on after it.
        """
        num_reqs = len(self._scheduler.running)
        schedule_ns, update_ns = self._host.schedule(num_reqs), self._host.update(num_reqs)
        now_ns, free_ns, gap_ns, oldest_end_ns = self._now_ns, self._device_free_ns, self._host.gap_ns, in_flight_end_ns
        line = []
        for duration_ns in latencies_ns:
            sched_ns = now_ns
            now_ns += schedule_ns
            start_ns = max(now_ns, free_ns)
            end_ns = start_ns + duration_ns
            free_ns = end_ns + gap_ns
            now_ns = max(now_ns, end_ns if oldest_end_ns is None else oldest_end_ns) + update_ns
            if oldest_end_ns is not None:
                oldest_end_ns = end_ns
            line.append((sched_ns, start_ns, end_ns, now_ns))
            if arrival_ns is not None and now_ns >= arrival_ns:
                break
        self._now_ns, self._device_free_ns = now_ns, free_ns
        return line

    def _take_in(
        self,
        steps: stretch.Steps,
        line: list[tuple[int, int, int, int]],
        in_flight: deque[_InFlight],
        times: RequestTimes,
    ) -> None:
        """Record a stretch: which steps have been taken in, and which one is in flight now."""
        if in_flight:  # asynchronous: one step behind
            oldest = in_flight.popleft()
            times.note_tokens(oldest.plan, (), line[0][3])
            if self._log is not None:
                self._log.add(oldest.plan, (), (oldest.sched_ns, oldest.start_ns, oldest.end_ns, line[0][3]))
            sched_ns, start_ns, end_ns, _ = line[-1]
            in_flight.append(_InFlight(steps.plan(len(line) - 1), sched_ns, start_ns, end_ns))
            updates = [now_ns for *_, now_ns in line[1:]]
        else:
            updates = [now_ns for *_, now_ns in line]
        if self._log is not None:
            self._log.add_alike(steps, [step[:3] for step in line[: len(updates)]], updates)

    def _wait(self, arrivals: deque[Request]) -> bool:
        """Nothing can run: move the clock to the next arrival; False when everything is done."""
        if not arrivals:
            if self._scheduler.has_unfinished:
                raise KvtwinError("waiting requests can never be scheduled: the KV cache is too small for them")
            return False
        if not self._scheduler.has_requests or self._scheduler.has_unfinished:
            self._now_ns = max(self._now_ns, arrivals[0].arrival_ns)
        return True
