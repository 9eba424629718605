"""The engine's loop, one step at a time: the specification.

Follows vLLM's `EngineCore.run_busy_loop` with `step` (synchronous) or `step_with_batch_queue` (asynchronous
scheduling: two batches in flight, the next one scheduled before the previous one's tokens are known).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.pricing import Pricer
from kvtwin.sim.latency.stats import batch_row
from kvtwin.sim.progress import Progress
from kvtwin.sim.vllm.cache_log import CacheLog
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.offload.connector import Connector, Ended
from kvtwin.sim.vllm.plan import StepPlan
from kvtwin.sim.vllm.recorder import RequestTimes, StepLog, StepRows
from kvtwin.sim.vllm.request import RequestBook
from kvtwin.sim.vllm.scheduler import VllmScheduler
from kvtwin.traces.errors import KvtwinError

_PER_TRANSFER: Final = 100  # steps without a token that count as one while transfers, which will end, hold blocks
_MORE_BESIDE_TRANSFERS: Final = 10  # the real 0.19.0 was seen to go 2.4 times as far and end
_MOST_WAITS: Final = 100_000  # for transfers, with nothing run in between


@dataclass(slots=True)
class InFlight:
    """A scheduled batch whose tokens have not been taken in yet; `ended`: the transfers whose end it reports."""

    plan: StepPlan
    sched_ns: int
    start_ns: int
    end_ns: int
    ended: Ended | None = None

    @property
    def tells(self) -> bool:
        """Whether anything changes when it is taken in."""
        return not self.plan.is_empty or bool(self.ended)


@dataclass(slots=True)
class Clock:
    """Where an engine's loop stands in time.

    Attributes:
        now_ns: the host's time.
        device_free_ns: when the device can start the next step.
        num_steps: steps scheduled so far.
        num_arrived: requests taken in so far.
    """

    now_ns: int = 0
    device_free_ns: int = 0
    num_steps: int = 0
    num_arrived: int = 0


class PlainLoop:
    """Takes every step by itself, however alike they are.

    Args:
        config: the engine's settings.
        requests: the workload.
        scheduler: decides.
        pricer: how long the model runs for a batch.
        host: time between steps.
        times: where the requests' time stamps go.
        log: where the steps go; None to keep none.
        progress: told how many requests have finished, whenever some have.
        offload: the levels below the pool, if there are any.
        cache_log: where their events go; None to keep none.
    """

    def __init__(
        self,
        config: VllmConfig,
        requests: RequestBook,
        scheduler: VllmScheduler,
        pricer: Pricer,
        host: HostTime,
        times: RequestTimes,
        log: StepLog | None,
        progress: Progress | None,
        offload: Connector | None = None,
        cache_log: CacheLog | None = None,
    ) -> None:
        self._progress, self._offload, self._cache_log = progress, offload, cache_log
        self._config, self._requests, self._times, self._log = config, requests, times, log
        self._pricer, self._host = pricer, host
        self.depth = 2 if config.async_scheduling else 1
        self.scheduler = scheduler
        self.clock = Clock()
        self.in_flight: deque[InFlight] = deque()
        # Every step computes a token, so a cache full of them takes no more steps than this to reach a new one, unless
        # somebody arrives who goes first.
        patience = 1 if offload is None else _MORE_BESIDE_TRANSFERS
        self._max_fruitless = 2 * patience * config.capacity_tokens * _PER_TRANSFER
        self._num_waits = 0  # in a row, for transfers
        self._fruitless = 0

    def turn(self) -> bool:
        """One turn of the loop: at most one batch scheduled, at most one taken in; False when all is served.

        Raises:
            KvtwinError: a waiting request can never be scheduled, or preemptions undo one another for ever.
        """
        self._add_arrived()
        executed = preempted = False
        if self.scheduler.has_requests:
            batch = self._schedule()
            executed, preempted = not batch.plan.is_empty, bool(batch.plan.preempted)
            self.in_flight.append(batch)
            fills = executed or (self._config.rules.queues_empty_batches and self.scheduler.has_requests)
            if len(self.in_flight) < self.depth and fills:
                return True  # step_with_batch_queue: fill the queue first
        if self.in_flight:
            done = self.in_flight.popleft()
            self._update(done)
            executed |= done.tells
        # An empty plan in flight is nothing to wait for: while transfers hold all requests back, there is always one.
        return executed or preempted or any(batch.tells for batch in self.in_flight) or self._wait()

    def note_progress(self) -> None:
        """Somebody has got a token that this loop did not see."""
        self._fruitless = 0

    def _add_arrived(self) -> None:
        clock, arrival_ns = self.clock, self._requests.arrival_ns
        while clock.num_arrived < len(arrival_ns) and arrival_ns[clock.num_arrived] <= clock.now_ns:
            self._times.queued[clock.num_arrived] = clock.now_ns
            self.scheduler.waiting.append(clock.num_arrived)
            clock.num_arrived += 1
            self._fruitless = 0

    def _schedule(self) -> InFlight:
        clock, offload = self.clock, self._offload
        sched_ns = clock.now_ns
        self._tell_time()
        if offload is not None:
            offload.begin_schedule(sched_ns)
        plan = self.scheduler.schedule()
        self._times.note_plan(plan, sched_ns)
        clock.now_ns += 0 if plan.is_empty else self._host.schedule(len(plan.requests))
        if offload is not None:
            clock.now_ns = offload.before_forward(clock.now_ns)
        start_ns, end_ns = self._launch(plan)
        ended = None if offload is None else offload.after_launch(clock.now_ns, None if plan.is_empty else end_ns)
        return InFlight(plan, sched_ns, start_ns, end_ns, ended)

    def _launch(self, plan: StepPlan) -> tuple[int, int]:
        """Give a step its place on the device: start and end. An empty one takes no time; it still has its place in
        the queue of batches."""
        clock = self.clock
        if plan.is_empty:
            if plan.preempted:
                clock.device_free_ns = self.scheduler.device_ready_ns(max(clock.now_ns, clock.device_free_ns))
            return clock.now_ns, clock.now_ns
        self._num_waits = 0
        duration_ns = self._pricer.step_ns(batch_row(plan.cache_lens, plan.input_lens), clock.num_steps)
        start_ns = self.scheduler.device_ready_ns(max(clock.now_ns, clock.device_free_ns))
        clock.device_free_ns = start_ns + duration_ns + self._host.gap_ns
        clock.num_steps += 1
        return start_ns, start_ns + duration_ns

    def _update(self, batch: InFlight) -> None:
        """The batch has run: advance the clock and feed its tokens back."""
        plan, clock = batch.plan, self.clock
        self._refuse_livelock(plan)
        if not plan.is_empty:
            clock.now_ns = max(clock.now_ns, batch.end_ns) + self._host.update(len(plan.requests))
            self._tell_time()
            self._take_in(batch)
        if batch.ended and self._offload is not None:
            self._tell_time()
            self._offload.take_in(batch.ended, clock.now_ns)

    def _take_in(self, batch: InFlight) -> None:
        plan, clock = batch.plan, self.clock
        finished = self.scheduler.update(plan)
        self._times.note_tokens(plan, finished, clock.now_ns)
        if finished and self._progress is not None:
            self._progress(len(finished))
        if self._log is not None:
            times_ns = (batch.sched_ns, batch.start_ns, batch.end_ns, clock.now_ns)
            self._log.add(StepRows.of_plan(plan, finished, times_ns))

    def _tell_time(self) -> None:
        if self._cache_log is not None:
            self._cache_log.now_ns = self.clock.now_ns

    def _refuse_livelock(self, plan: StepPlan) -> None:
        """vLLM can preempt the same requests over and over, each time before one of them has a new token: with the
        priority policy and equal (priority, arrival), the victim is the first of the running list."""
        waits = self._offload is not None and self._offload.has_jobs
        if any(plan.samples):
            self._fruitless = 0
        elif plan.preempted or not plan.is_empty:
            self._fruitless += 1 if waits else _PER_TRANSFER
        if self._fruitless > self._max_fruitless:
            raise KvtwinError(
                f"no request has got a token for {self._fruitless // _PER_TRANSFER} steps: preemptions undo one another, as they do in "
                "vLLM; give the KV cache more blocks, or let admissions reserve whole sequences"
            )

    def _refuse_endless_waits(self) -> None:
        """On a host too small for what waiting requests bring from the disk, each pushes out what another needs, and
        vLLM goes on like that for ever."""
        self._num_waits += 1
        if self._num_waits > _MOST_WAITS:
            raise KvtwinError(
                f"waiting requests can never be scheduled: nothing ran for {_MOST_WAITS:,} transfers, as each of them "
                "pushes out what another one brings from the disk; give the host more (kv_offloading_size)"
            )

    def _wait(self) -> bool:
        """Nothing can run: move the clock to the next arrival; False when everything is done."""
        clock, scheduler = self.clock, self.scheduler
        transfer_ns = self._offload.next_ns() if self._offload is not None and scheduler.has_requests else None
        if transfer_ns is not None:
            self._refuse_endless_waits()
            arrivals_ns = self._requests.arrival_ns[clock.num_arrived : clock.num_arrived + 1]
            clock.now_ns = max(clock.now_ns, min([transfer_ns, *arrivals_ns]))
            return True
        if clock.num_arrived == len(self._requests):
            if scheduler.has_unfinished:
                raise KvtwinError("waiting requests can never be scheduled: the KV cache is too small for them")
            if self._offload is not None:
                self._offload.drain()
            return scheduler.has_requests
        if not scheduler.has_requests or scheduler.has_unfinished:
            clock.now_ns = max(clock.now_ns, self._requests.arrival_ns[clock.num_arrived])
        return True
