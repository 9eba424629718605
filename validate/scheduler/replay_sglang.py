"""SGLang's simulated scheduler under a recorded clock."""

from __future__ import annotations

import dataclasses
from collections import deque

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig, rules_version
from kvtwin.sim.sglang.engine import Launched
from kvtwin.sim.sglang.record import Recorder
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.simulate import build_engine, build_requests
from kvtwin.traces.run import Run, RunInfo
from kvtwin.validate.scheduler.replay import StepTimes

_NO_LATENCY = LinearLatency(1, 0, 0, 0)  # never asked: the recording says how long a step takes


class SglangReplay:
    """See `replay.ReplayEngine`.

    Args:
        measured, config: see `replay.replay_schedule`.
        turns_idle: whether the loop turns once more before it waits for an arrival, and new_token_ratio starts anew. A
            server's does. On a virtual clock (the oracle's, ours) time jumps to the arrival first, with overlap.
    """

    def __init__(self, measured: Run, config: SglangConfig, *, turns_idle: bool = True) -> None:
        self._measured, self._config, self.turns_idle = measured, config, turns_idle
        self.depth = 1 if config.disable_overlap_schedule else 2
        # write_back copies what is evicted to the host before the batch is formed, while requests arrive.
        self.blocks = config.enable_hierarchical_cache and config.hicache_write_policy == "write_back"
        self._requests = build_requests(measured, config)
        self._recorder = Recorder(len(self._requests), record_steps=True)
        engine = build_engine(config, _NO_LATENCY, observer=self._recorder)
        self._scheduler = self._recorder.scheduler = engine.scheduler
        self._clock = engine.clock
        self._in_flight: deque[Launched] = deque()

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be assumed: a divergence that follows from it is not the scheduler's."""
        notes = []
        if not self._config.disable_radix_cache:
            requests = self._measured.requests
            if requests.column("block_hashes").null_count:
                notes.append("block_hashes are not recorded: a prompt without them shares no prefix with another")
            if requests.column("output_block_hashes").null_count:
                notes.append("output_block_hashes are not recorded: a prompt that continues an answer misses it")
        if self._config.hicache_storage_backend:
            notes.append(
                "when the engine looked at its prefetches between two steps is not recorded: at every transfer's end"
            )
        return tuple(notes)

    def add(self, row: int, time_ns: int, now_ns: int) -> None:
        """See `ReplayEngine`."""
        self._clock.advance(now_ns)
        self._recorder.arrived(self._requests[row], time_ns)
        self._scheduler.add(self._requests[row])

    def schedule(self, times: StepTimes) -> bool:
        """See `ReplayEngine`."""
        self._clock.advance(times.sched_ns)
        batch = self._scheduler.next_batch()
        if batch is None:
            if not self._in_flight:
                self._scheduler.note_idle()
            return False
        # Where the two have parted, copies may hold this engine up longer than the recorded one.
        step = Launched(batch, min(self._clock.now_ns, times.start_ns), times.start_ns, times.end_ns)
        self._recorder.launched(step)
        self._in_flight.append(step)
        return True

    def update(self, time_ns: int) -> None:
        """See `ReplayEngine`."""
        self._clock.advance(time_ns)
        step = self._in_flight.popleft()
        self._recorder.processed(step, self._scheduler.process(step.batch), time_ns)

    @property
    def is_idle(self) -> bool:
        """See `ReplayEngine`."""
        return not self._scheduler.waiting and not self.is_busy

    @property
    def is_held_up(self) -> bool:
        """See `ReplayEngine`: by prefetches from storage."""
        scheduler = self._scheduler
        if self.is_busy or not scheduler.waiting or not self._config.hicache_storage_backend:
            return False
        return all(scheduler.cache.holds_up(request) for request in scheduler.waiting)

    @property
    def is_busy(self) -> bool:
        """See `ReplayEngine`: something runs."""
        scheduler = self._scheduler
        last = scheduler.last_batch.requests if scheduler.last_batch is not None else []  # not yet among the running
        return scheduler.chunked is not None or not all(request.finished for request in (*scheduler.running, *last))

    def next_event_ns(self) -> int | None:
        """See `ReplayEngine`."""
        scheduler = self._scheduler
        if self.is_busy or not scheduler.waiting:
            return None
        if scheduler.running and self._hinders(scheduler.running):
            return self._clock.now_ns  # the loop's next turn finds that all of the batch have ended, if nothing else
        if not self._config.enable_hierarchical_cache:
            return None
        event_ns: int | None = self._scheduler.cache.next_event_ns()
        return event_ns if event_ns is not None and event_ns > self._clock.now_ns else None

    def _hinders(self, running: list[SglangRequest]) -> bool:
        """Whether requests that have ended keep others out as long as they are in the batch."""
        is_full = self._scheduler.batch_is_full or len(running) >= self._config.max_running_requests
        return is_full or self._config.mixes_chunks

    def run(self) -> Run:
        """See `ReplayEngine`."""
        info = RunInfo(
            kind="simulated",
            engine=f"sglang {self._config.version} (rules of {rules_version(self._config.version)})",
            hardware=self._measured.info.hardware,
            model=self._measured.info.model,
            hash_block_tokens=self._measured.info.hash_block_tokens,
            engine_config=dataclasses.asdict(self._config),
            source={},
        )
        tables = self._recorder.tables(self._measured.requests, self._requests)
        return Run(info, tables, name="the replayed run")
