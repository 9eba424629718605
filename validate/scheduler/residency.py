"""How long each request stood in each queue, by the run's own columns or by what its steps say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.calibrate.stats import FloatArray
from kvtwin.traces.run import Run
from kvtwin.validate.gates import QUEUES
from kvtwin.validate.scheduler.lists import chunks, flat

IntArray = npt.NDArray[np.int64]


def recorded_queues(run: Run) -> tuple[str, ...]:
    """The queues whose residency the run has in columns of its own."""
    return tuple(queue for queue in QUEUES if run.requests.column(f"{queue}_ns").null_count < run.requests.num_rows)


def recorded_residency(run: Run, queue: str) -> FloatArray:
    """Nanoseconds in a queue by request, as the run recorded them; NaN where it did not."""
    return _floats(run.requests.column(f"{queue}_ns"))


def derived_residency(run: Run) -> Mapping[str, FloatArray]:
    """Nanoseconds in the Waiting and Running queues by request, from its stamps and the preemptions; NaN if unknown.

    A request waits from its queue entry to its first schedule() call and from each preemption to the call that takes it
    in again; the rest until its last token it runs.
    """
    requests = run.requests
    queued = _floats(pc.coalesce(requests.column("queued_ns"), requests.column("arrival_ns")))
    scheduled, finish = (_floats(requests.column(name)) for name in ("scheduled_ns", "finish_ns"))
    away = _time_preempted(run, finish) if run.has("steps") else np.zeros(len(queued))
    return {"waiting": scheduled - queued + away, "running": finish - scheduled - away}


def _floats(column: pa.ChunkedArray) -> FloatArray:
    values: FloatArray = pc.cast(column, pa.float64()).to_numpy()
    return values


def _time_preempted(run: Run, finish_ns: FloatArray) -> FloatArray:
    """Nanoseconds between each preemption of a request and the schedule() call that takes it in again (or its end)."""
    steps = run.steps
    sched_ns = pc.coalesce(steps.column("sched_ns"), steps.column("start_ns")).to_numpy()
    victims, counts = flat(steps.column("preempted"))
    away: FloatArray = np.zeros(len(finish_ns))
    if not len(victims):
        return away
    left = np.repeat(np.arange(steps.num_rows), counts)
    # (request, step) as one number, so that the next step of a request is one search away.
    width = steps.num_rows + 1
    member = _memberships(steps, np.unique(victims), width)
    place = np.searchsorted(member, victims * width + left, side="right")
    following = np.append(member, -1)[place]
    returns = following // width == victims
    back = np.where(returns, sched_ns[np.where(returns, following % width, 0)], finish_ns[victims])
    np.add.at(away, victims, back - sched_ns[left])
    return away


def _memberships(steps: pa.Table, requests: IntArray, width: int) -> IntArray:
    """Sorted request * width + step of every step that each of some requests takes part in."""
    parts = []
    for first, part in chunks(steps):
        rows, counts = flat(part.column("request"))
        step = np.repeat(np.arange(first, first + part.num_rows), counts)
        kept = np.isin(rows, requests)
        parts.append(rows[kept] * width + step[kept])
    return np.sort(np.concatenate(parts))
