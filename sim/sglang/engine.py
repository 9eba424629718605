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
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.sglang.batch import Batch
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.scheduler import SglangScheduler
from kvtwin.traces.errors import KvtwinError

# Iterations without a batch, an arrival or a transfer to wait for, after which nothing will change any more.
_MAX_SPINS: Final = 3


@dataclass(slots=True, eq=False)
class Launched:
    """A batch on its way, and its times in ns: formed, the model starts, its tokens are back."""

    batch: Batch
    sched_ns: int
    start_ns: int
    end_ns: int


class Observer(Protocol):
    """Writes down what the engine does."""

    def arrived(self, request: SglangRequest, now_ns: int) -> None:
        """A request is about to be queued."""

    def launched(self, step: Launched) -> None:
        """A step has been formed; the scheduler stands as it left it."""

    def processed(self, step: Launched, finished: Sequence[SglangRequest], now_ns: int) -> None:
        """Its tokens have been taken in."""


class SglangEngine:
    """Serves requests with one SGLang server.

    Args:
        scheduler: decides; its cache shares `clock`.
        clock: virtual time.
        latency: how long the model runs for a batch.
        host: time of the scheduler's process around each step.
        observer: writes down what happens.
    """

    def __init__(
        self,
        scheduler: SglangScheduler,
        clock: Clock,
        latency: LatencyModel,
        host: HostTime | None = None,
        *,
        observer: Observer,
    ) -> None:
        self.scheduler, self.clock = scheduler, clock
        self._latency, self._host, self._observer = latency, host or HostTime(), observer
        self._overlap = not scheduler.config.disable_overlap_schedule
        self._cache: Any = scheduler.cache if scheduler.config.enable_hierarchical_cache else None
        self._device_free_ns = 0
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
            arrival_ns = requests[next_arrival].arrival_ns if next_arrival < len(requests) else None
            if self._wait(arrival_ns):
                continue
            if not scheduler.has_unfinished and next_arrival == len(requests):
                return
            spins += 1
            if spins > _MAX_SPINS and next_arrival == len(requests):
                raise KvtwinError(f"{len(scheduler.waiting)} waiting requests can never be scheduled")

    def _launch(self, batch: Batch) -> Launched:
        sched_ns = self.clock.now_ns
        stats = BatchStats.of_batch(batch.cache_lens, batch.input_lens)
        duration_ns = int(self._latency.step_ns(stats, self.num_steps)[0])
        self.clock.advance(sched_ns + self._host.schedule(len(batch.requests)))
        start_ns = max(self.clock.now_ns, self._device_free_ns)
        end_ns = max(start_ns + duration_ns, batch.load_end_ns or 0)
        self._device_free_ns = end_ns + self._host.gap_ns
        self.num_steps += 1
        step = Launched(batch, sched_ns, start_ns, end_ns)
        self._observer.launched(step)
        return step

    def _process(self, step: Launched) -> None:
        self.clock.advance(step.end_ns)
        self.clock.advance(self.clock.now_ns + self._host.update(len(step.batch.requests)))
        finished = self.scheduler.process(step.batch)
        self._observer.processed(step, finished, self.clock.now_ns)

    def _wait(self, arrival_ns: int | None) -> bool:
        """Nothing ran: move the clock to the next arrival or transfer after now; False if there is none."""
        times_ns = [arrival_ns, None if self._cache is None else self._cache.next_event_ns()]
        coming = [time_ns for time_ns in times_ns if time_ns is not None and time_ns > self.clock.now_ns]
        if coming:
            self.clock.advance(min(coming))
        return bool(coming)
