"""SGLang's loops on a virtual clock: arrivals, batch, latency, result (`event_loop_normal`, `event_loop_overlap`).

The overlap loop forms and launches batch k before it takes in the result of batch k - 1, so a batch does not know the
tokens of the step before it. Loads from the host run beside the forward that needs them, which ends no earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.pricing import VectorPricer, pricer_for
from kvtwin.sim.latency.stats import batch_row
from kvtwin.sim.sglang.batch import DECODE, Batch
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.scheduler import SglangScheduler
from kvtwin.sim.sglang.stretch import Stretch, advance, decode_sums, num_steady_steps
from kvtwin.traces.errors import KvtwinError

# Iterations without a batch, an arrival or a transfer to wait for, after which nothing will change any more.
_MAX_SPINS: Final = 3
# Fewer alike steps are cheaper one by one; more are priced in several calls.
_FEWEST_STEPS: Final = 2
_MOST_STEPS: Final = 4096


@dataclass(slots=True, eq=False)
class Launched:
    """A batch on its way, and its times in ns: formed, the model starts, its tokens are back.

    `load_wait_ns` of the last it has waited for loads from the host that went on when the model was done.
    """

    batch: Batch
    sched_ns: int
    start_ns: int
    end_ns: int
    load_wait_ns: int = 0


class Observer(Protocol):
    """Writes down what the engine does."""

    def arrived(self, request: SglangRequest, now_ns: int) -> None:
        """A request is about to be queued."""

    def launched(self, step: Launched) -> None:
        """A step has been formed; the scheduler stands as it left it."""

    def processed(self, step: Launched, finished: Sequence[SglangRequest], now_ns: int) -> None:
        """Its tokens have been taken in."""

    @property
    def records_steps(self) -> bool:
        """Whether `stretched` looks at more than the requests."""

    def stretched(self, stretch: Stretch) -> None:
        """Alike decode steps have been taken; under overlap, each took in the step before it, and the last is out."""


class SglangEngine:
    """Serves requests with one SGLang server.

    Args:
        scheduler: decides; its cache shares `clock`.
        clock: virtual time.
        latency: how long the model runs for a batch.
        host: time of the scheduler's process around each step.
        observer: writes down what happens.
        plain: take every step by itself, however alike they are (the specification).
    """

    def __init__(
        self,
        scheduler: SglangScheduler,
        clock: Clock,
        latency: LatencyModel,
        host: HostTime | None = None,
        *,
        observer: Observer,
        plain: bool = False,
    ) -> None:
        self._plain = plain
        self.scheduler, self.clock = scheduler, clock
        self._pricer = VectorPricer(latency) if plain else pricer_for(latency)
        self._host, self._observer = host or HostTime(), observer
        self._overlap = not scheduler.config.disable_overlap_schedule
        self._cache: Any = scheduler.cache if scheduler.config.enable_hierarchical_cache else None
        self._device_free_ns = 0
        self._last_step_ns = 1
        self.num_steps = 0

    def run(self, requests: Sequence[SglangRequest]) -> None:
        """Serve `requests`, sorted by arrival, to the last token.

        Raises:
            KvtwinError: waiting requests can never be scheduled, or SGLang itself would stop (UpstreamStopError).
        """
        scheduler, next_arrival, spins = self.scheduler, 0, 0
        pending: Launched | None = None
        while True:
            while next_arrival < len(requests) and requests[next_arrival].arrival_ns <= self.clock.now_ns:
                self._observer.arrived(requests[next_arrival], self.clock.now_ns)
                scheduler.add(requests[next_arrival])
                next_arrival += 1
            arrival_ns = requests[next_arrival].arrival_ns if next_arrival < len(requests) else None
            if not self._plain and (taken := self._stretch(arrival_ns, pending)):
                pending = taken if self._overlap else None
                continue
            batch = scheduler.next_batch()
            step = None if batch is None else self._launch(batch)
            if not self._overlap:
                pending = step
            if pending is not None:
                self._process(pending)
            elif step is None:
                scheduler.note_idle()
            pending = step if self._overlap else None
            if step is not None:
                spins = 0
                continue
            if self._wait(arrival_ns):
                continue
            if not scheduler.has_unfinished and next_arrival == len(requests):
                return
            spins += 1
            if spins > _MAX_SPINS and next_arrival == len(requests):
                raise KvtwinError(f"{len(scheduler.waiting)} waiting requests can never be scheduled")

    def _launch(self, batch: Batch) -> Launched:
        sched_ns = self.clock.now_ns
        if batch.mode == DECODE:
            row: tuple[int, ...] = (*decode_sums(batch.cache_lens, spread=self._pricer.needs_spread), 0, 0, 0, 0, 0)
        else:
            row = batch_row(batch.cache_lens, batch.input_lens)
        duration_ns = self._pricer.step_ns(row, self.num_steps)
        self._last_step_ns = duration_ns
        self.clock.advance(sched_ns + self._host.schedule(len(batch.requests)))
        start_ns = max(self.clock.now_ns, self._device_free_ns)
        load_wait_ns = max(0, (batch.load_end_ns or 0) - (start_ns + duration_ns))
        end_ns = start_ns + duration_ns + load_wait_ns
        self._device_free_ns = end_ns + self._host.gap_ns
        self.num_steps += 1
        step = Launched(batch, sched_ns, start_ns, end_ns, load_wait_ns)
        self._observer.launched(step)
        return step

    def _process(self, step: Launched) -> None:
        self.clock.advance(step.end_ns)
        self.clock.advance(self.clock.now_ns + self._host.update(len(step.batch.requests)))
        finished = self.scheduler.process(step.batch)
        self._observer.processed(step, finished, self.clock.now_ns)

    def _stretch(self, arrival_ns: int | None, pending: Launched | None) -> Launched | None:
        """Take as many alike decode steps as there are; returns the last one, None if there are too few."""
        scheduler = self.scheduler
        if self._overlap and (pending is None or pending.batch is not scheduler.last_batch):
            return None
        most = num_steady_steps(scheduler, self._steps_until(arrival_ns))
        if most < _FEWEST_STEPS:
            return None
        requests = scheduler.running
        kv_lens = [request.kv_len for request in requests]
        durations = self._pricer.stretch(*decode_sums(kv_lens, spread=self._pricer.needs_spread), most, self.num_steps)
        durations_ns = durations.list_ns(min(most, durations.num_steps)).tolist()
        line = self._timeline(durations_ns, pending.end_ns if pending is not None else None, arrival_ns)
        count = len(line[0])
        available, ratios = advance(scheduler, count, record=self._observer.records_steps)
        self.num_steps += count
        stretch = Stretch(requests, kv_lens, *line, available, ratios)
        self._observer.stretched(stretch)
        batch = Batch(DECODE, requests, stretch.cache_lens(count - 1), [1] * len(requests), 0)
        scheduler.last_batch = batch
        self._last_step_ns = durations_ns[count - 1]
        return Launched(batch, stretch.sched_ns[-1], stretch.start_ns[-1], stretch.end_ns[-1])

    def _steps_until(self, arrival_ns: int | None) -> int:
        """About as many steps as fit before the next arrival; more are not worth pricing."""
        if arrival_ns is None:
            return _MOST_STEPS
        return min(_MOST_STEPS, (arrival_ns - self.clock.now_ns) // self._last_step_ns + 2)

    def _timeline(
        self, durations_ns: list[int], pending_end_ns: int | None, arrival_ns: int | None
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Run the clock over alike steps, up to the first after which an arrival is seen.

        Returns:
            sched_ns, start_ns, end_ns and now_ns of each step (see `Stretch`).
        """
        num_reqs = len(self.scheduler.running)
        schedule_ns, update_ns, gap_ns = self._host.schedule(num_reqs), self._host.update(num_reqs), self._host.gap_ns
        now_ns, free_ns, awaited_ns = self.clock.now_ns, self._device_free_ns, pending_end_ns
        scheds, starts, ends, nows = [], [], [], []
        for duration_ns in durations_ns:
            scheds.append(now_ns)
            now_ns += schedule_ns
            start_ns = max(free_ns, now_ns)
            end_ns = start_ns + duration_ns
            free_ns = end_ns + gap_ns
            if awaited_ns is None:
                now_ns = end_ns + update_ns
            else:
                now_ns = (max(awaited_ns, now_ns)) + update_ns
                awaited_ns = end_ns
            starts.append(start_ns)
            ends.append(end_ns)
            nows.append(now_ns)
            if arrival_ns is not None and now_ns >= arrival_ns:
                break
        self.clock.advance(now_ns)
        self._device_free_ns = free_ns
        return scheds, starts, ends, nows

    def _wait(self, arrival_ns: int | None) -> bool:
        """Nothing ran: move the clock to the next arrival or transfer after now; False if there is none."""
        times_ns = [arrival_ns, None if self._cache is None else self._cache.next_event_ns()]
        coming = [time_ns for time_ns in times_ns if time_ns is not None and time_ns > self.clock.now_ns]
        if coming:
            self.clock.advance(min(coming))
        return bool(coming)
