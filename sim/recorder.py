"""Write down what the engine does, and turn it into the tables of a Run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from kvtwin.sim.request import Request
from kvtwin.sim.schedulers.plan import StepPlan
from kvtwin.sim.stretch import Steps
from kvtwin.traces.schema import REQUESTS, STEPS

_UNKNOWN = -1  # a request's time stamp that has not been set


class RequestTimes:
    """Time stamps and counts of each request, by row, for the `requests` table."""

    def __init__(self, num_requests: int) -> None:
        self.queued, self.scheduled, self.first_token, self.finish, self.cached = (
            array("q", [_UNKNOWN]) * num_requests for _ in range(5)
        )

    def note_plan(self, plan: StepPlan, sched_ns: int) -> None:
        """A schedule() call: note who is admitted for the first time."""
        for request, cache_len in zip(plan.requests, plan.cache_lens, strict=True):
            if self.scheduled[request.row] == _UNKNOWN:
                self.scheduled[request.row] = sched_ns
                self.cached[request.row] = cache_len

    def note_tokens(self, plan: StepPlan, finished: Iterable[Request], now_ns: int) -> None:
        """A step's tokens are known: note first tokens and finishes."""
        for request, sampled in zip(plan.requests, plan.samples, strict=True):
            if sampled and self.first_token[request.row] == _UNKNOWN:
                self.first_token[request.row] = now_ns
        for request in finished:
            self.finish[request.row] = now_ns

    def table(self, workload: pa.Table, requests: Iterable[Request]) -> pa.Table:
        """The workload's `requests` table with the simulated columns filled in."""
        columns = {name: workload.column(name) for name in REQUESTS.names}
        for name, values in (
            ("queued_ns", self.queued),
            ("scheduled_ns", self.scheduled),
            ("first_token_ns", self.first_token),
            ("finish_ns", self.finish),
            ("cached_tokens", self.cached),
        ):
            column = np.frombuffer(values, dtype=np.int64) if values else np.empty(0, np.int64)
            columns[name] = pa.array(column, mask=column == _UNKNOWN)
        for name in ("client_first_token_ns", "client_finish_ns"):  # no client is simulated
            columns[name] = pa.nulls(workload.num_rows, pa.int64())
        columns["num_preemptions"] = pa.array([request.num_preemptions for request in requests], pa.int64())
        columns["instance"] = pa.array(np.zeros(workload.num_rows, np.int32))
        return pa.table(columns, schema=REQUESTS)


class StepLog:
    """One row per step, in compact arrays, for the `steps` table."""

    _SCALARS = (
        "sched_ns", "start_ns", "end_ns", "update_ns",
        "num_waiting", "num_running", "num_free_blocks", "num_evicted_blocks",
    )  # fmt: skip
    _LISTS = ("request", "cache_len", "input_len", "preempted", "finished")

    def __init__(self) -> None:
        self._scalars = {name: array("q") for name in self._SCALARS}
        self._values = {name: array("i") for name in self._LISTS}
        self._offsets = {name: array("i", [0]) for name in self._LISTS}

    def add(self, plan: StepPlan, finished: Iterable[Request], times_ns: tuple[int, int, int, int]) -> None:
        """Note one step; `times_ns` are sched, start, end, update."""
        counts = (plan.num_waiting, plan.num_running, plan.num_free_blocks, plan.num_evicted_blocks)
        for name, value in zip(self._SCALARS, (*times_ns, *counts), strict=True):
            self._scalars[name].append(value)
        self._add_list("request", [request.row for request in plan.requests])
        self._add_list("cache_len", plan.cache_lens)
        self._add_list("input_len", plan.input_lens)
        self._add_list("preempted", [request.row for request in plan.preempted])
        self._add_list("finished", [request.row for request in finished])

    def add_alike(self, steps: Steps, times_ns: Sequence[tuple[int, int, int]], updates_ns: Sequence[int]) -> None:
        """Note the first `len(times_ns)` steps of a stretch; `times_ns` are sched, start, end."""
        count, size = len(times_ns), len(steps.requests)
        columns = [*zip(*times_ns, strict=True), updates_ns] if count else [()] * 4
        for name, values in zip(self._SCALARS[:4], columns, strict=True):
            self._scalars[name].extend(values)
        for name, value in (("num_waiting", steps.num_waiting), ("num_running", size)):
            self._scalars[name].extend([value] * count)
        self._scalars["num_free_blocks"].extend(steps.use.num_free[:count].tolist())
        self._scalars["num_evicted_blocks"].extend(steps.use.num_evicted[:count].tolist())
        rows = array("i", [request.row for request in steps.requests])
        contexts = np.add.outer(np.arange(count), np.array(steps.cache_lens))
        self._add_alike("request", rows * count, count, size)
        self._add_alike("cache_len", array("i", contexts.astype(np.int32).tobytes()), count, size)
        self._add_alike("input_len", array("i", [1]) * (count * size), count, size)
        for name in ("preempted", "finished"):
            self._add_alike(name, array("i"), count, 0)

    def _add_alike(self, name: str, values: array[int], count: int, size: int) -> None:
        """Append `count` lists of `size` values each, laid end to end."""
        first = len(self._values[name])
        self._values[name].extend(values)
        self._offsets[name].extend(first + size * step for step in range(1, count + 1))

    def _add_list(self, name: str, values: list[int]) -> None:
        self._values[name].extend(values)
        self._offsets[name].append(len(self._values[name]))

    def table(self) -> pa.Table:
        """The `steps` table."""
        num_steps = len(self._scalars["start_ns"])
        columns: dict[str, pa.Array] = {"step": pa.array(np.arange(num_steps, dtype=np.int64))}
        columns["instance"] = pa.array(np.zeros(num_steps, np.int32))
        for name, values in self._scalars.items():
            columns[name] = pa.array(np.array(values, dtype=np.int64))
        for name in self._LISTS:
            items = pa.array(np.array(self._values[name], dtype=np.int32))
            offsets = pa.array(np.array(self._offsets[name], dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, items)
        return pa.table({name: columns[name] for name in STEPS.names}, schema=STEPS)
