"""Write down what the engine does, and turn it into the tables of a Run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.sim.vllm.plan import StepPlan
from kvtwin.sim.vllm.request import IntArray, Request, Status
from kvtwin.traces.schema import REQUESTS, STEPS

# Columns of the workload's recording that say nothing of this run.
_NOT_SIMULATED: Final = ("client_first_token_ns", "client_finish_ns")

UNKNOWN = -1  # a request's time stamp that has not been set


class RequestTimes:
    """Time stamps and counts of each request, by row, for the `requests` table.

    A request runs from its first admission to its end, but for the time that preemptions keep it away; so only
    preemptions need to be followed.
    """

    def __init__(self, num_requests: int) -> None:
        self.queued, self.scheduled, self.first_token, self.finish, self.cached = (
            array("q", [UNKNOWN]) * num_requests for _ in range(5)
        )
        self.num_preemptions, self.cached_host, self.cached_storage, self.prefetch = (
            array("q", bytes(8 * num_requests)) for _ in range(4)
        )
        self._away, self._swapped = (array("q", bytes(8 * num_requests)) for _ in range(2))
        self._left: dict[int, tuple[int, array[int]]] = {}  # preempted rows: when, and where the time goes

    def note_plan(self, plan: StepPlan, sched_ns: int) -> None:
        """A schedule() call: note who is admitted for the first time, and who is preempted."""
        for request in plan.preempted:
            self.note_preempted(request.row, sched_ns, swapped=request.status is Status.SWAPPED)
        for request, cache_len in zip(plan.requests, plan.cache_lens, strict=True):
            if self._left and request.row in self._left:
                self.note_back(request.row, sched_ns)
            if self.scheduled[request.row] == UNKNOWN:
                self.scheduled[request.row] = sched_ns
                self.cached[request.row] = cache_len

    def note_preempted(self, row: int, now_ns: int, *, swapped: bool = False) -> None:
        """A running request goes back to Waiting, or to Swapped."""
        self.num_preemptions[row] += 1
        self._left[row] = (now_ns, self._swapped if swapped else self._away)

    def note_back(self, row: int, now_ns: int) -> None:
        """A preempted request runs again, or has finished with the token that was in flight."""
        left_ns, spent_ns = self._left.pop(row)
        spent_ns[row] += now_ns - left_ns

    def note_load(self, row: int, host_tokens: int, storage_tokens: int) -> None:
        """What a waiting request fetches from lower levels; its first admission's counts."""
        if self.scheduled[row] == UNKNOWN:
            self.cached_host[row], self.cached_storage[row] = host_tokens, storage_tokens

    def note_tokens(self, plan: StepPlan, finished: Iterable[Request], now_ns: int) -> None:
        """A step's tokens are known: note first tokens and finishes."""
        for request, sampled in zip(plan.requests, plan.samples, strict=True):
            if sampled and self.first_token[request.row] == UNKNOWN:
                self.first_token[request.row] = now_ns
        for request in finished:
            self.finish[request.row] = now_ns
            if self._left and request.row in self._left:
                self.note_back(request.row, now_ns)

    def table(self, workload: pa.Table, rows: IntArray) -> pa.Table:
        """The workload's `requests` table with the simulated columns filled in.

        Args:
            workload: table of schema REQUESTS.
            rows: where each request stands in it.
        """
        place = np.argsort(rows)
        columns = {name: workload.column(name) for name in REQUESTS.names}
        for name, values in (
            ("queued_ns", self.queued),
            ("scheduled_ns", self.scheduled),
            ("first_token_ns", self.first_token),
            ("finish_ns", self.finish),
            ("cached_tokens", self.cached),
        ):
            column = _as_numpy(values)[place]
            columns[name] = pa.array(column, mask=column == UNKNOWN)
        for name in _NOT_SIMULATED:
            columns[name] = pa.nulls(workload.num_rows, pa.int64())
        unserved = _as_numpy(self.finish) == UNKNOWN
        for name, column in self._residency_ns().items():
            columns[name] = pa.array(column[place], mask=unserved[place])
        for name, counts in (
            ("num_preemptions", self.num_preemptions),
            ("cached_host_tokens", self.cached_host),
            ("cached_storage_tokens", self.cached_storage),
        ):
            columns[name] = pa.array(_as_numpy(counts)[place])
        columns["instance"] = pa.array(np.zeros(workload.num_rows, np.int32))
        return pa.table(columns, schema=REQUESTS)

    def _residency_ns(self) -> dict[str, IntArray]:
        """Time in each of the four queues, by column; they add up to finish - queued."""
        away, swapped, prefetch = (_as_numpy(values) for values in (self._away, self._swapped, self.prefetch))
        queued, scheduled, finish = (_as_numpy(values) for values in (self.queued, self.scheduled, self.finish))
        return {
            "waiting_ns": scheduled - queued + away - prefetch,
            "prefetch_ns": prefetch,
            "running_ns": finish - scheduled - away - swapped,
            "swapped_ns": swapped,
        }


def _as_numpy(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64) if values else np.empty(0, np.int64)


@dataclass(slots=True)  # not frozen: a million are made, and a frozen one takes three times as long
class StepRows:
    """Consecutive steps of one batch, each context one token longer than at the step before; often just one step.

    Attributes:
        requests: rows of the batch's members, in the scheduler's order.
        cache_lens, input_lens: tokens computed before the first step and new tokens per step, per member.
        preempted: rows of the requests preempted while scheduling; only of single steps.
        finished: rows of the requests that finish with the last of the steps.
        num_waiting: requests waiting after each schedule().
        num_running: requests running after each schedule().
        num_free_blocks: after each schedule(), by step.
        num_evicted_blocks: cached blocks that each step reallocated.
        times_ns: (sched, start, end, update) of each step.
    """

    requests: Sequence[int]
    cache_lens: Sequence[int]
    input_lens: Sequence[int]
    preempted: Sequence[int]
    finished: Sequence[int]
    num_waiting: int
    num_running: int
    num_free_blocks: Sequence[int]
    num_evicted_blocks: Sequence[int]
    times_ns: Sequence[tuple[int, int, int, int]]

    @classmethod
    def of_plan(cls, plan: StepPlan, finished: Iterable[Request], times_ns: tuple[int, int, int, int]) -> StepRows:
        """One step; `times_ns`: its (sched, start, end, update)."""
        return cls(
            requests=[request.row for request in plan.requests],
            cache_lens=plan.cache_lens,
            input_lens=plan.input_lens,
            preempted=[request.row for request in plan.preempted],
            finished=[request.row for request in finished],
            num_waiting=plan.num_waiting,
            num_running=plan.num_running,
            num_free_blocks=[plan.num_free_blocks],
            num_evicted_blocks=[plan.num_evicted_blocks],
            times_ns=[times_ns],
        )

    def head(self, count: int) -> StepRows:
        """The first `count` steps of a stretch."""
        return replace(
            self,
            num_free_blocks=self.num_free_blocks[:count],
            num_evicted_blocks=self.num_evicted_blocks[:count],
            times_ns=self.times_ns[:count],
        )

    def last(self) -> StepRows:
        """The last step of a stretch."""
        ahead = len(self.times_ns) - 1
        return replace(
            self,
            cache_lens=[cache_len + ahead for cache_len in self.cache_lens],
            num_free_blocks=self.num_free_blocks[-1:],
            num_evicted_blocks=self.num_evicted_blocks[-1:],
            times_ns=self.times_ns[-1:],
        )


class StepLog:
    """Steps as they happened, in compact arrays; a stretch of like steps is kept as one and expanded by `table`."""

    _TIMES = ("sched_ns", "start_ns", "end_ns", "update_ns")
    _NAMES = ("request", "preempted", "finished")
    _LISTS = ("request", "cache_len", "input_len", "preempted", "finished")

    def __init__(self) -> None:
        self._times = array("q")  # four per step
        self._blocks = array("q")  # free and evicted, per step
        self._queues = array("q")  # waiting and running, per stretch
        self._counts = array("q")  # steps per stretch
        self._values = {name: array("i") for name in self._LISTS}  # per stretch
        self._offsets = {name: array("q", [0]) for name in self._LISTS}

    def add(self, rows: StepRows) -> None:
        """Note one step or a stretch of them."""
        self._times.extend(chain.from_iterable(rows.times_ns))
        self._blocks.extend(chain.from_iterable(zip(rows.num_free_blocks, rows.num_evicted_blocks, strict=True)))
        self._queues.extend((rows.num_waiting, rows.num_running))
        self._counts.append(len(rows.times_ns))
        lists = (rows.requests, rows.cache_lens, rows.input_lens, rows.preempted, rows.finished)
        for name, values in zip(self._LISTS, lists, strict=True):
            self._values[name].extend(values)
            self._offsets[name].append(len(self._values[name]))

    def table(self, rows: IntArray) -> pa.Table:
        """The `steps` table, a row per step.

        Args:
            rows: where each request stands in the workload's table.
        """
        counts = _as_numpy(self._counts)
        times = _as_numpy(self._times).reshape(-1, 4)
        blocks = _as_numpy(self._blocks).reshape(-1, 2)
        queues = np.repeat(_as_numpy(self._queues).reshape(-1, 2), counts, axis=0)
        columns: dict[str, pa.Array] = {
            "step": pa.array(np.arange(len(times), dtype=np.int64)),
            "instance": pa.array(np.zeros(len(times), np.int32)),
            "num_waiting": pa.array(queues[:, 0]),
            "num_running": pa.array(queues[:, 1]),
            "num_free_blocks": pa.array(blocks[:, 0]),
            "num_evicted_blocks": pa.array(blocks[:, 1]),
        }
        for place, name in enumerate(self._TIMES):
            columns[name] = pa.array(times[:, place])
        for name in self._LISTS:
            columns[name] = self._expanded(name, counts, rows)
        return pa.table({name: columns[name] for name in STEPS.names}, schema=STEPS)

    def _expanded(self, name: str, counts: IntArray, rows: IntArray) -> pa.ListArray:
        """One list per step; along a stretch, cache_len grows by one."""
        values = np.array(self._values[name], dtype=np.int32)
        if name in self._NAMES:
            values = rows[values].astype(np.int32)
        offsets = _as_numpy(self._offsets[name])
        sizes = np.repeat(np.diff(offsets), counts)
        if name == "finished":  # with the last step
            sizes = np.zeros_like(sizes)
            sizes[np.cumsum(counts) - 1] = np.diff(offsets)
        ends = np.cumsum(sizes)
        starts = np.repeat(offsets[:-1], counts)
        source = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
        items = values[source]
        if name == "cache_len":
            ahead = np.arange(len(sizes)) - np.repeat(np.cumsum(counts) - counts, counts)
            items = items + np.repeat(ahead, sizes).astype(np.int32)
        bounds = np.concatenate(([0], ends)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(bounds), pa.array(items))
