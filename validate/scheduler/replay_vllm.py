"""vLLM's simulated scheduler under a recorded clock."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from kvtwin.sim.vllm.block_pool import BlockPool, Pool
from kvtwin.sim.vllm.config import VllmConfig, rules_version
from kvtwin.sim.vllm.counted_pool import CountedPool
from kvtwin.sim.vllm.plan import StepPlan
from kvtwin.sim.vllm.recorder import RequestTimes, StepLog, StepRows
from kvtwin.sim.vllm.request import IntArray, Status
from kvtwin.sim.vllm.scheduler import VllmScheduler
from kvtwin.sim.vllm.simulate import build_requests
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.validate.scheduler.partial import Beginning
from kvtwin.validate.scheduler.recorded_hits import RecordedHits
from kvtwin.validate.scheduler.replay import StepTimes, queued_ns

_MAX_EMPTY_CALLS = 1000  # with the priority policy a request can preempt itself; the engine then calls again


class VllmReplay:
    """See `replay.ReplayEngine`."""

    def __init__(self, measured: Run, config: VllmConfig, hits: IntArray | None = None) -> None:
        self._measured, self._config = measured, config
        self.depth = 2 if config.async_scheduling else 1
        self.blocks = False
        self._rows: IntArray = np.argsort(queued_ns(measured), kind="stable")
        self._place = np.argsort(self._rows).tolist()
        self._book = build_requests(measured, config, None, self._rows)
        self._scheduler = VllmScheduler(config, self._book, _pool(config))
        if hits is not None:
            self._scheduler.allocate_by(RecordedHits(self._scheduler.kv, hits[self._rows]))
        self.turns_idle = True
        self._times, self._log = RequestTimes(len(self._book)), StepLog()
        self._in_flight: deque[tuple[StepPlan, StepTimes]] = deque()

    def resume(self, beginning: Beginning, now_ns: int) -> None:
        """Go on where a log begins in the middle: requests run already, with so many tokens computed.

        Raises:
            InputError: they hold more KV blocks than there are.
        """
        for row, num_computed in zip(beginning.running.tolist(), beginning.num_computed.tolist(), strict=True):
            request = self._book[self._place[row]]
            # All that is known but the last token has been computed.
            request.num_output_tokens = max(0, num_computed + 1 - request.num_prompt_tokens)
            if not self._scheduler.kv.can_grow(request, num_computed):
                problem = f"num_gpu_blocks is {self._config.num_gpu_blocks}: less than the log's first requests hold"
                raise InputError(problem, path=self._measured.path)
            self._scheduler.kv.grow(request, num_computed)
            request.num_computed_tokens, request.status = num_computed, Status.RUNNING
            self._scheduler.running.append(request)
        self._take_over_times(beginning, now_ns)

    def _take_over_times(self, beginning: Beginning, now_ns: int) -> None:
        """What happened to requests before the log begins is as it was recorded."""
        requests = self._measured.requests
        columns = {"queued_ns": self._times.queued, "scheduled_ns": self._times.scheduled}
        columns |= {"first_token_ns": self._times.first_token, "finish_ns": self._times.finish}
        for name, times in columns.items():
            recorded = requests.column(name).to_pylist()
            for row in (*beginning.running.tolist(), *beginning.gone.tolist()):
                if recorded[row] is not None and recorded[row] <= now_ns:
                    times[self._place[row]] = recorded[row]

    def add(self, row: int, time_ns: int, now_ns: int) -> None:  # noqa: ARG002 - it takes no time of its own
        """See `ReplayEngine`."""
        self._times.queued[self._place[row]] = time_ns
        self._scheduler.waiting.append(self._place[row])

    def schedule(self, times: StepTimes) -> bool:
        """See `ReplayEngine`."""
        for _ in range(_MAX_EMPTY_CALLS):
            plan = self._scheduler.schedule()
            self._times.note_plan(plan, times.sched_ns)
            if not plan.is_empty:
                self._in_flight.append((plan, times))
                return True
            if not plan.preempted:
                break
        return False

    def update(self, time_ns: int) -> None:
        """See `ReplayEngine`."""
        plan, times = self._in_flight.popleft()
        finished = self._scheduler.update(plan)
        self._times.note_tokens(plan, finished, time_ns)
        times_ns = (times.sched_ns, times.start_ns, times.end_ns, time_ns)
        self._log.add(StepRows.of_plan(plan, finished, times_ns))

    @property
    def is_idle(self) -> bool:
        """See `ReplayEngine`."""
        return not self._scheduler.has_unfinished

    @property
    def is_busy(self) -> bool:
        """See `ReplayEngine`."""
        return self._scheduler.has_unfinished

    @property
    def is_held_up(self) -> bool:
        """See `ReplayEngine`: the recording shows every call that matters."""
        return False

    def next_event_ns(self) -> int | None:
        """See `ReplayEngine`: no transfers."""
        return None

    def run(self) -> Run:
        """See `ReplayEngine`."""
        info = RunInfo(
            kind="simulated",
            engine=f"vllm {self._config.version} (rules of {rules_version(self._config.version)})",
            hardware=self._measured.info.hardware,
            model=self._measured.info.model,
            hash_block_tokens=self._measured.info.hash_block_tokens,
            engine_config=dataclasses.asdict(self._config),
            source={},
        )
        tables = {
            "requests": self._times.table(self._measured.requests, self._rows),
            "steps": self._log.table(self._rows),
        }
        return Run(info, tables, name="the replayed run")


def _pool(config: VllmConfig) -> Pool:
    if not config.enable_prefix_caching:
        return CountedPool(config.num_gpu_blocks)
    return BlockPool(
        config.num_gpu_blocks, enable_prefix_caching=True, reuse_uncached_first=config.rules.reuse_uncached_first
    )
