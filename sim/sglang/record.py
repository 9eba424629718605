"""Write down what a simulated SGLang does, as the tables of a Run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from kvtwin.sim.progress import Progress
from kvtwin.sim.sglang.engine import Launched
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.residency import Residency
from kvtwin.sim.sglang.scheduler import SglangScheduler
from kvtwin.sim.sglang.stretch import Stretch
from kvtwin.traces.schema import REQUESTS, STEPS

# Columns of the workload's recording that say nothing of this run.
_NOT_SIMULATED: Final = ("client_first_token_ns", "client_finish_ns")

_UNKNOWN: Final = -1


class Recorder:
    """Time stamps of every request and, if asked for, a row per step.

    Args:
        num_requests: rows of the workload.
        record_steps: keep the steps.

    Attributes:
        scheduler: the engine's, set before it runs.
    """

    def __init__(self, num_requests: int, *, record_steps: bool, progress: Progress | None = None) -> None:
        self._progress = progress
        self.scheduler: SglangScheduler | None = None
        self._queued, self._scheduled, self._first_token, self._finish = (
            array("q", [_UNKNOWN]) * num_requests for _ in range(4)
        )
        self._residency = Residency(num_requests)
        self._steps: _StepRows | None = _StepRows() if record_steps else None

    @property
    def records_steps(self) -> bool:
        """See `Observer`."""
        return self._steps is not None

    def arrived(self, request: SglangRequest, now_ns: int) -> None:
        """See `Observer`."""
        self._queued[request.row] = now_ns
        self._residency.queued(request, now_ns)

    def launched(self, step: Launched) -> None:
        """See `Observer`."""
        assert self.scheduler is not None
        batch, requeued = step.batch, self.scheduler.requeued
        for request in requeued:
            self._residency.left(request, step.sched_ns)
        for request in batch.requests[: batch.num_prefills]:
            self._residency.admitted(request, step.sched_ns, step.load_wait_ns)
            if self._scheduled[request.row] == _UNKNOWN:
                self._scheduled[request.row] = step.sched_ns
        if self._steps is not None:
            self._steps.add(step, self.scheduler)
        requeued.clear()

    def processed(self, step: Launched, finished: Sequence[SglangRequest], now_ns: int) -> None:
        """See `Observer`."""
        batch = step.batch
        for request in batch.requests[: batch.num_prefills]:
            if request.num_outputs and self._first_token[request.row] == _UNKNOWN:
                self._first_token[request.row] = now_ns
        for request in finished:
            self._finish[request.row] = now_ns
            self._residency.left(request, now_ns)
        if finished and self._progress is not None:
            self._progress(len(finished))
        if self._steps is not None:
            self._steps.taken_in(finished, now_ns)

    def stretched(self, stretch: Stretch) -> None:
        """See `Observer`."""
        if self._steps is not None:
            assert self.scheduler is not None
            self._steps.add_stretch(stretch, self.scheduler)

    def tables(self, workload: pa.Table, requests: Iterable[SglangRequest]) -> dict[str, pa.Table]:
        """The `requests` table of the workload with the simulated columns filled in, and `steps` if kept."""
        requests = list(requests)
        columns: dict[str, Any] = {name: workload.column(name) for name in REQUESTS.names}
        for name, values in (
            ("queued_ns", self._queued),
            ("scheduled_ns", self._scheduled),
            ("first_token_ns", self._first_token),
            ("finish_ns", self._finish),
        ):
            column = _as_numpy(values)
            columns[name] = pa.array(column, mask=column == _UNKNOWN)
        unserved = _as_numpy(self._finish) == _UNKNOWN
        for name, values in self._residency.columns().items():
            columns[name] = pa.array(_as_numpy(values), mask=unserved)
        columns["swapped_ns"] = pa.array(np.zeros(workload.num_rows, np.int64), mask=unserved)
        for name in _NOT_SIMULATED:
            columns[name] = pa.nulls(workload.num_rows, pa.int64())
        for name, attribute in (
            ("cached_tokens", "num_cached_tokens"),
            ("cached_host_tokens", "num_host_tokens"),
            ("cached_storage_tokens", "num_storage_tokens"),
            ("num_preemptions", "num_retractions"),
        ):
            columns[name] = pa.array([getattr(request, attribute) for request in requests], pa.int64())
        columns["instance"] = pa.array(np.zeros(workload.num_rows, np.int32))
        tables = {"requests": pa.table(columns, schema=REQUESTS)}
        if self._steps is not None:
            tables["steps"] = self._steps.table()
        return tables


class _StepRows:
    """Rows of the `steps` table. Blocks are KV pages; free ones are those free now or evictable."""

    _SCALARS = ("sched_ns", "start_ns", "end_ns", "num_waiting", "num_running", "num_free_blocks", "num_evicted_blocks")
    _LISTS = ("request", "cache_len", "input_len", "preempted")

    def __init__(self) -> None:
        self._scalars = {name: array("q") for name in self._SCALARS}
        self._values = {name: array("i") for name in (*self._LISTS, "finished")}
        self._offsets = {name: array("i", [0]) for name in (*self._LISTS, "finished")}
        self._updates = array("q")
        self._num_evicted = 0

    def add(self, step: Launched, scheduler: SglangScheduler) -> None:
        """Note a step as it is launched."""
        batch = step.batch
        rows = [request.row for request in batch.requests]
        requeued = [request.row for request in scheduler.requeued]
        times_ns = (step.sched_ns, step.start_ns, step.end_ns)
        self._add(times_ns, scheduler.pool.available, scheduler, (rows, batch.cache_lens, batch.input_lens, requeued))

    def _add(
        self,
        times_ns: tuple[int, int, int],
        available: int,
        scheduler: SglangScheduler,
        lists: tuple[Sequence[int], ...],
    ) -> None:
        page_size, cache = scheduler.pool.page_size, scheduler.cache
        free = (available + cache.evictable_size()) // page_size
        # What was evicted since the last step was evicted for this one; within a stretch nothing more is.
        evicted = (cache.num_evicted - self._num_evicted) // page_size
        self._num_evicted = cache.num_evicted
        scalars = (*times_ns, len(scheduler.waiting), len(scheduler.running), free, evicted)
        for name, value in zip(self._SCALARS, scalars, strict=True):
            self._scalars[name].append(value)
        for name, values in zip(self._LISTS, lists, strict=True):
            self._add_list(name, values)

    def taken_in(self, finished: Sequence[SglangRequest], now_ns: int) -> None:
        """Note what came of the oldest step whose tokens were still out."""
        self._updates.append(now_ns)
        self._add_list("finished", [request.row for request in finished])

    def add_stretch(self, stretch: Stretch, scheduler: SglangScheduler) -> None:
        """Note each step of a stretch; what is taken in after each is the oldest step that is out (`taken_in`)."""
        rows, input_lens = [request.row for request in stretch.requests], [1] * len(stretch.requests)
        times_ns = zip(stretch.sched_ns, stretch.start_ns, stretch.end_ns, strict=True)
        for place, times in enumerate(times_ns):
            lists = (rows, stretch.cache_lens(place), input_lens, ())
            self._add(times, stretch.available[place], scheduler, lists)
            self.taken_in((), stretch.now_ns[place])

    def _add_list(self, name: str, values: Iterable[int]) -> None:
        self._values[name].extend(values)
        self._offsets[name].append(len(self._values[name]))

    def table(self) -> pa.Table:
        """The `steps` table."""
        num_steps = len(self._scalars["start_ns"])
        columns: dict[str, Any] = {"step": pa.array(np.arange(num_steps, dtype=np.int64))}
        columns["instance"] = pa.array(np.zeros(num_steps, np.int32))
        columns["update_ns"] = pa.array(np.array(self._updates, dtype=np.int64))
        for name, scalars in self._scalars.items():
            columns[name] = pa.array(np.array(scalars, dtype=np.int64))
        for name, values in self._values.items():
            offsets = pa.array(np.array(self._offsets[name], dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(np.array(values, dtype=np.int32)))
        return pa.table({name: columns[name] for name in STEPS.names}, schema=STEPS)


def _as_numpy(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.int64) if values else np.empty(0, np.int64)
