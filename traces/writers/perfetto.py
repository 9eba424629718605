"""A run's timeline as Chrome trace JSON, for https://ui.perfetto.dev or chrome://tracing.

The format is "Trace Event Format" (Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):
complete events ("X") for steps, nestable async events ("b", "e") for requests and their phases, counters ("C") and
metadata ("M"). Each instance is a process. Times are microseconds from the run's first event on, exact to the ns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import replacing_text
from kvtwin.traces.run import Run
from kvtwin.traces.table import check_table

Ints = npt.NDArray[np.int64]
Pause = tuple[int, int | None]  # preempted at, running again at (None: never)

_BATCH_ROWS: Final = 1 << 15  # steps held at once: memory stays flat, however long the run
_TIMES: Final = ("arrival_ns", "queued_ns", "scheduled_ns", "finish_ns")
_DETAILS: Final = (
    "input_tokens", "output_tokens", "cached_tokens", "num_preemptions", "first_token_ns", "waiting_ns", "prefetch_ns",
    "running_ns", "swapped_ns",
)  # fmt: skip
_COUNTERS: Final = {"requests": {"running": "num_running", "waiting": "num_waiting"},
                    "KV blocks": {"free": "num_free_blocks"}}  # fmt: skip


def write_perfetto(run: Run, path: str | os.PathLike[str]) -> dict[str, int]:
    """Write the run's timeline, replacing an older file: all of it or nothing.

    Steps are slices; where two overlap (asynchronous scheduling, pipelines) the later one has a lane of its own.
    A request is an async slice named by its id, with its phases inside: frontend (before the engine's queue),
    waiting, prefetch, running, swapped. Preemptions stand where the steps have them; of a prefetch only the duration
    is recorded, so it stands right before the first admission. What never ended has no end.

    Args:
        run: any run; steps that lie on disk are read in batches.
        path: a name that ends in .gz is compressed.

    Returns:
        How many events of each kind were written: "X" steps, "b" begins, "e" ends, "C" counters, "M" names.

    Raises:
        InputError: the place cannot be written to, or the run's tables break their schema.
    """
    with replacing_text(path) as text:
        return _Writer(text, _origin_ns(run)).write(run)


@dataclass
class _Instance:
    """One process of the trace: when its lanes are free again, and its counters as last written."""

    lanes: list[int] = field(default_factory=list)
    counters: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def lane(self, start: int, end: int) -> int:
        """The first lane in which nothing runs at `start`, taken until `end`."""
        lane = next((number for number, free in enumerate(self.lanes) if free <= start), len(self.lanes))
        self.lanes[lane : lane + 1] = [end]
        return lane


class _Writer:
    """Writes events one by one; nothing but the requests and the preemptions is kept."""

    def __init__(self, stream: IO[str], origin_ns: int) -> None:
        self.stream, self.origin = stream, origin_ns
        self.counts: dict[str, int] = {}
        self.instances: dict[int, _Instance] = {}

    def write(self, run: Run) -> dict[str, int]:
        head = {"displayTimeUnit": "ms", "otherData": {"origin_ns": str(self.origin), "kind": run.info.kind}}
        self.stream.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        pauses = _Pauses(run.requests.num_rows)
        for steps in _batches(run):
            self.steps(steps)
            pauses.add(steps)
        self.requests(run.requests, pauses.found)
        for number, instance in self.instances.items():
            self.names(number, len(instance.lanes))
        self.stream.write("\n]}\n")
        return self.counts

    def event(self, kind: str, process: int, body: str) -> None:
        separator = ",\n" if self.counts else ""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.stream.write(f'{separator}{{"ph":"{kind}","pid":{process},{body}}}')

    def us(self, time_ns: int) -> str:
        """Microseconds since the origin, all digits."""
        return _microseconds(time_ns - self.origin)

    def instance(self, number: int) -> _Instance:
        return self.instances.setdefault(number, _Instance())

    def names(self, number: int, num_lanes: int) -> None:
        """What the tracks of one instance are called."""
        self.event("M", number, f'"name":"process_name","args":{{"name":"instance {number}"}}')
        for lane in range(num_lanes):
            name = "steps" if lane == 0 else f"steps, overlapping {lane}"
            self.event("M", number, f'"tid":{lane},"name":"thread_name","args":{{"name":"{name}"}}')

    # -- steps and counters --------------------------------------------------------------------------------

    def steps(self, steps: pa.Table) -> None:
        sizes = _step_sizes(steps)
        columns = {name: steps[name].to_pylist() for name in ("step", "instance", "sched_ns", "start_ns", "end_ns")}
        columns |= {name: steps[name].to_pylist() for parts in _COUNTERS.values() for name in parts.values()}
        for row in range(steps.num_rows):
            number = columns["instance"][row] or 0
            start, end = columns["start_ns"][row], columns["end_ns"][row]
            lane = self.instance(number).lane(start, end)
            details = ",".join(f'"{name}":{values[row]}' for name, values in sizes.items())
            times = f'"ts":{self.us(start)},"dur":{_microseconds(end - start)}'
            name = f"step {columns['step'][row]}"
            self.event("X", number, f'"tid":{lane},"cat":"step","name":"{name}",{times},"args":{{{details}}}')
            sched = columns["sched_ns"][row]
            self.counters(number, start if sched is None else sched, {key: columns[key][row] for key in columns})

    def counters(self, number: int, time_ns: int, row: Mapping[str, Any]) -> None:
        """The counts that differ from the last ones; unknown counts are left out."""
        last = self.instance(number).counters
        for name, parts in _COUNTERS.items():
            values = tuple(row[column] for column in parts.values())
            if values == last.get(name) or None in values:
                continue
            last[name] = values
            shown = ",".join(f'"{part}":{value}' for part, value in zip(parts, values, strict=True))
            self.event("C", number, f'"name":"{name}","ts":{self.us(time_ns)},"args":{{{shown}}}')

    # -- requests ------------------------------------------------------------------------------------------

    def requests(self, requests: pa.Table, pauses: Mapping[int, Sequence[Pause]]) -> None:
        names = ("request_id", "instance", *_TIMES, *_DETAILS)
        columns = {name: requests[name].to_pylist() for name in names}
        for row in range(requests.num_rows):
            request = {name: values[row] for name, values in columns.items()}
            number = request["instance"] or 0
            self.instance(number)
            details = json.dumps({name: request[name] for name in _DETAILS if request[name] is not None})
            self.async_slice(number, row, request["request_id"], request["arrival_ns"], None, f',"args":{details}')
            for phase, start, end in _phases(request, pauses.get(row, ())):
                self.async_slice(number, row, phase, start, end)
            if request["finish_ns"] is not None:
                self.async_end(number, row, request["request_id"], request["finish_ns"])

    def async_slice(self, number: int, row: int, name: str, start: int, end: int | None, more: str = "") -> None:
        """A begin, and an end where it is known."""
        body = _request(row, name)
        self.event("b", number, f'{body},"ts":{self.us(start)}{more}')
        if end is not None:
            self.async_end(number, row, name, end)

    def async_end(self, number: int, row: int, name: str, end: int) -> None:
        self.event("e", number, f'{_request(row, name)},"ts":{self.us(end)}')


def _request(row: int, name: str) -> str:
    """What begins and ends share. A local id belongs to the process: a viewer shows the request below its instance."""
    return f'"cat":"request","id2":{{"local":"0x{row:x}"}},"name":{json.dumps(name)}'


class _Pauses:
    """When each preempted request stopped running and when it ran again, from batches of steps in order."""

    def __init__(self, num_requests: int) -> None:
        self.found: dict[int, list[Pause]] = {}
        self._open: dict[int, int] = {}  # preempted and not seen again: when
        self._asked = np.zeros(num_requests, np.bool_)

    def add(self, steps: pa.Table) -> None:
        preempted = pc.list_flatten(steps["preempted"]).to_numpy()
        rows = pc.list_parent_indices(steps["preempted"]).to_numpy()
        events = [(request, -1) for request in self._open]
        events += zip(preempted.tolist(), rows.tolist(), strict=True)
        if not events:
            return
        keys = self._memberships(steps, [request for request, _ in events])
        began = pc.coalesce(steps["sched_ns"], steps["start_ns"]).to_numpy()
        for request, row in events:
            stopped = self._open.pop(request, None)
            if row >= 0:
                stopped = int(began[row])
            assert stopped is not None
            at = int(np.searchsorted(keys, request * steps.num_rows + row, side="right"))
            if at < keys.size and keys[at] // steps.num_rows == request:
                self.found.setdefault(request, []).append((stopped, int(began[keys[at] % steps.num_rows])))
            else:
                self._open[request] = stopped
        # What is still open at the run's end stays so: it is told as a pause without an end.

    def _memberships(self, steps: pa.Table, requests: Sequence[int]) -> Ints:
        """request x num_rows + row of every batch that one of the requests is in, ascending."""
        members = pc.list_flatten(steps["request"]).to_numpy()
        rows = pc.list_parent_indices(steps["request"]).to_numpy()
        self._asked[requests] = True
        asked = self._asked[members]
        self._asked[requests] = False
        return np.sort(members[asked].astype(np.int64) * steps.num_rows + rows[asked])


def _phases(request: Mapping[str, Any], pauses: Sequence[Pause]) -> Iterator[tuple[str, int, int | None]]:
    """(phase, start, end) in the order of time; an end of None is unknown. Phases without extent are left out."""
    arrival, queued, scheduled, finish = (request[name] for name in _TIMES)
    entered = arrival if queued is None else queued
    marks: list[tuple[str, int]] = [("frontend", arrival), ("waiting", entered)]
    if scheduled is not None:
        prefetch = min(request["prefetch_ns"] or 0, scheduled - entered)
        marks += [("prefetch", scheduled - prefetch), ("running", scheduled)]
        away = "swapped" if request["swapped_ns"] else "waiting"
        for stopped, again in pauses:
            marks += [(away, stopped)] + ([("running", again)] if again is not None else [])
    for (name, start), (_, end) in zip(marks, [*marks[1:], ("", finish)], strict=True):
        if end is None or end > start:
            yield name, start, end


def _step_sizes(steps: pa.Table) -> dict[str, list[int]]:
    """What is told of each step."""
    lists = {"num_reqs": "request", "num_preempted": "preempted", "num_finished": "finished"}
    sizes = {name: pc.fill_null(pc.list_value_length(steps[column]), 0) for name, column in lists.items()}
    columns = {name: values.to_pylist() for name, values in sizes.items()}
    for name, column in (("num_tokens", "input_len"), ("context_tokens", "cache_len")):
        values = pc.list_flatten(steps[column]).to_numpy()
        rows = pc.list_parent_indices(steps[column]).to_numpy()
        columns[name] = np.bincount(rows, values, steps.num_rows).astype(np.int64).tolist()
    return columns


def _batches(run: Run) -> Iterator[pa.Table]:
    """The steps in order, some thousands at a time; none where the run has no steps."""
    if not run.has("steps"):
        return
    if run.path is None:
        yield from (run.steps.slice(begin, _BATCH_ROWS) for begin in range(0, run.steps.num_rows, _BATCH_ROWS))
        return
    path = run.path / "steps.parquet"
    try:
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS):
            yield check_table(pa.Table.from_batches([batch]), "steps", path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable Parquet file ({error})", path=path) from error


def _origin_ns(run: Run) -> int:
    """The first arrival or the first step, whichever is earlier; 0 for an empty run."""
    first = [pc.min(run.requests["arrival_ns"]).as_py()]
    first += [pc.min(steps[name]).as_py() for steps in _batches(run) for name in ("sched_ns", "start_ns")]
    return min((time for time in first if time is not None), default=0)


def _microseconds(time_ns: int) -> str:
    """All digits: a float of microseconds would lose some.

    >>> _microseconds(1_234_567), _microseconds(-1)
    ('1234.567', '-0.001')
    """
    sign, size = ("-" if time_ns < 0 else ""), abs(time_ns)
    return f"{sign}{size // 1000}.{size % 1000:03d}"
