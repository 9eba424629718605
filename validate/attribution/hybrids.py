"""Simulations in which more and more layers are their recording, from the twin to the real run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.sim.engines import EngineConfig, simulate_engine
from kvtwin.sim.frontend import order_at_the_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.pricing import VectorPricer
from kvtwin.sim.latency.stats import IntArray
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.plain import Clock, PlainLoop
from kvtwin.sim.vllm.recorder import RequestTimes
from kvtwin.sim.vllm.scheduler import VllmScheduler
from kvtwin.sim.vllm.simulate import build_requests
from kvtwin.traces.run import Run
from kvtwin.validate.attribution.recorded import RecordedTimes, engine_arrivals
from kvtwin.validate.scheduler.recorded_hits import RecordedHits
from kvtwin.validate.scheduler.replay import replay_schedule

CACHE_AND_SCHEDULE: Final = "cache and schedule"  # of SGLang, whose hits cannot be set to the recorded ones

OUTPUT: Final = "output"  # how many tokens are generated

HOST_AND_SCHEDULE: Final = "host and schedule"  # where it is not known when the recorded schedule() was called


@dataclass(frozen=True)
class Twin:
    """What predicts a recording.

    Attributes:
        workload: the recording's requests, with the prompts that were sent; rows as in the recording.
        config, latency, host: the simulated engine; without a latency none of it can be simulated again.
        run: what it simulated; requests in the recording's order.
    """

    workload: Run
    config: EngineConfig
    latency: LatencyModel | None
    host: HostTime
    run: Run


@dataclass(frozen=True)
class Stage:
    """The requests as they fare once one more layer is recorded.

    Attributes:
        layer: which layer that is; "" for the twin itself.
        requests: table of schema REQUESTS, rows as in the recording.
    """

    layer: str
    requests: pa.Table


def stages(measured: Run, twin: Twin, replayed: Run | None) -> Iterator[Stage]:
    """The twin, then one more recorded layer at a time, in the order in which a request meets them.

    output: they generate as many tokens; arrival: they reach the engine's queue when they did; cache: they hit what they hit; step times: the model runs
    as long as it ran, in the closed loop, so that what its errors do to the queue counts as theirs; host: the scheduler is
    called when the recorded one was (`replay_schedule`), so that only decisions are simulated; schedule: those are the
    recorded ones too, and the steps table says what came of them. A layer that the recording does not hold is passed
    over: its share is in the next one's.

    Args:
        measured: the recording; its queue's clock is that of its steps.
        twin: what predicts it.
        replayed: `replay(measured, twin)`; None where it is not known when the recorded scheduler was called.
    """
    yield Stage("", twin.run.requests)
    latency = twin.latency
    if latency is None:
        return
    if not measured.requests.column("output_tokens").equals(twin.run.requests.column("output_tokens")):
        run = simulate_engine(twin.workload, twin.config, latency, twin.host, record_steps=False)
        yield Stage(OUTPUT, run.requests)
    if measured.requests.column("queued_ns").null_count:
        return
    loop = _Loop(twin, engine_arrivals(measured))
    yield Stage("arrival", loop.serve(latency))
    hits = recorded_hits(measured, twin)
    if hits is not None:
        loop = dataclasses.replace(loop, hits=hits)
        yield Stage("cache", loop.serve(latency))
    if not measured.has("steps"):
        return
    yield Stage("step times", dataclasses.replace(loop, steps=measured.steps).serve(latency))
    if replayed is None:
        yield Stage(HOST_AND_SCHEDULE, _as_recorded(measured))
        return
    yield Stage("host", (replayed if hits is None else replay(measured, twin, hits)).requests)
    layer = "schedule" if isinstance(twin.config, VllmConfig) else CACHE_AND_SCHEDULE
    yield Stage(layer, _as_recorded(measured))


def knows_calls(measured: Run, config: EngineConfig) -> bool:
    """Whether it is known when schedule() was called: recorded, or, of an engine that does not schedule ahead, clear."""
    if not measured.has("steps"):
        return False
    ahead = config.async_scheduling if isinstance(config, VllmConfig) else not config.disable_overlap_schedule
    return not (ahead and measured.steps.column("sched_ns").null_count)


def replay(measured: Run, twin: Twin, hits: IntArray | None = None) -> Run:
    """The simulated scheduler under the recording's clock."""
    asked = Run(measured.info, {"requests": twin.workload.requests, "steps": measured.steps}, name="the recording")
    return replay_schedule(asked, twin.config, hits=hits)


@dataclass(frozen=True)
class _Loop:
    """The simulated engine with some of its layers recorded."""

    twin: Twin
    arrival_ns: IntArray
    hits: IntArray | None = None  # blocks, by row
    steps: pa.Table | None = None  # where step times are as recorded

    def serve(self, latency: LatencyModel) -> pa.Table:
        """The `requests` table."""
        twin, host = self.twin, dataclasses.replace(self.twin.host, frontend_ns=0, frontend_per_token_ns=0)
        table = twin.workload.requests
        index = table.schema.get_field_index("arrival_ns")
        workload = Run(
            twin.workload.info, {"requests": table.set_column(index, "arrival_ns", pa.array(self.arrival_ns))}
        )
        if isinstance(twin.config, VllmConfig) and (self.hits is not None or self.steps is not None):
            return self._serve_plainly(workload, twin.config, latency, host)
        if self.steps is not None:
            latency = RecordedTimes(latency, self.steps)
        return simulate_engine(workload, twin.config, latency, host, record_steps=False).requests

    def _serve_plainly(self, workload: Run, config: VllmConfig, latency: LatencyModel, host: HostTime) -> pa.Table:
        arrival_ns, order = order_at_the_engine(workload.requests, host)
        book = build_requests(workload, config, arrival_ns, order)
        pool = BlockPool(
            config.num_gpu_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            reuse_uncached_first=config.rules.reuse_uncached_first,
        )
        scheduler = VllmScheduler(config, book, pool)
        if self.hits is not None:
            scheduler.allocate_by(RecordedHits(scheduler.kv, self.hits[order]))
        times = RequestTimes(len(book))
        clock = Clock()
        if self.steps is not None:
            latency = RecordedTimes(latency, self.steps, lambda: max(clock.now_ns, clock.device_free_ns))
        loop = PlainLoop(config, book, scheduler, VectorPricer(latency), host, times, None, None)
        loop.clock = clock
        while loop.turn():
            pass
        return times.table(workload.requests, order)


def recorded_hits(measured: Run, twin: Twin) -> IntArray | None:
    """Blocks that each request hit; None where that is unknown, or the twin's hits are the same."""
    recorded = measured.requests.column("cached_tokens")
    config = twin.config
    if recorded.null_count or not isinstance(config, VllmConfig) or not config.enable_prefix_caching:
        return None
    tokens: IntArray = recorded.to_numpy()
    if np.array_equal(tokens, twin.run.requests.column("cached_tokens").to_numpy()):
        return None
    return tokens // config.block_size


def _as_recorded(measured: Run) -> pa.Table:
    """First tokens and finishes as the recorded steps say: the update of the step that made the token.

    Where the log says with which step a request finished, that counts: an overlapping loop may run it once more.
    """
    steps, requests = measured.steps, measured.requests
    done = steps.column("update_ns")
    done_ns = (steps.column("end_ns") if done.null_count else done).to_numpy()
    members = steps.column("request").combine_chunks()
    row = members.flatten().to_numpy()
    at = np.repeat(done_ns, np.diff(members.offsets.to_numpy()))
    computed = sum(steps.column(name).combine_chunks().flatten().to_numpy() for name in ("cache_len", "input_len"))
    prompts = requests.column("input_tokens").to_numpy()[row]
    first, finish = (np.full(requests.num_rows, -1, np.int64) for _ in range(2))
    makes_token = computed >= prompts
    rows, times = row[makes_token], at[makes_token]
    first[rows[::-1]] = times[::-1]  # the earliest, since later assignments win
    finish[rows] = times
    ended = steps.column("finished").combine_chunks()
    if not ended.null_count:
        finish[ended.flatten().to_numpy()] = np.repeat(done_ns, np.diff(ended.offsets.to_numpy()))
    for name, values in (("first_token_ns", first), ("finish_ns", finish)):
        index = requests.schema.get_field_index(name)
        requests = requests.set_column(index, name, pa.array(values, mask=values < 0))
    return requests
