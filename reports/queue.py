"""Queue length over time: how many requests wait and how many run, from a Run's steps or its requests.

A curve is right-continuous: `values[i]` holds from `times_ns[i]` until `times_ns[i + 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.run import Run

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Source = Literal["steps", "queued_ns", "arrival_ns"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A count over time.

    Attributes:
        times_ns: strictly increasing, on the run's own clock.
        values: the count from that time on.
    """

    times_ns: Ints
    values: Ints

    def mean(self) -> float:
        """Time-weighted mean between the first and the last change; NaN without an extent."""
        extent = self.times_ns[-1] - self.times_ns[0] if self.times_ns.size else 0
        return float(np.sum(np.diff(self.times_ns) * self.values[:-1]) / extent) if extent else float("nan")

    def peak(self) -> int:
        """The largest count; 0 for an empty curve."""
        return int(self.values.max(initial=0))


@dataclass(frozen=True, slots=True)
class QueueLengths:
    """Requests that wait and requests that run, over all instances of a run."""

    waiting: Curve
    running: Curve


def common_source(measured: Run, simulated: Run) -> Source | None:
    """Where both runs can take their curves from, so that the two mean the same thing; None if nowhere.

    "steps" are the engine's own counts; else waiting begins at "queued_ns" or, if unknown, at "arrival_ns".
    """
    runs = (measured, simulated)
    if all(_has_counts(run) for run in runs):
        return "steps"
    if not all(_known(run.requests, "scheduled_ns") and _known(run.requests, "finish_ns") for run in runs):
        return None
    return "queued_ns" if all(_known(run.requests, "queued_ns") for run in runs) else "arrival_ns"


def queue_lengths(run: Run, source: Source) -> QueueLengths:
    """The two curves of one run.

    From requests, one that was never scheduled (or never finished) waits (or runs) to the end, and a
    preempted one counts as running; from steps it waits again.
    """
    return _from_steps(run.steps) if source == "steps" else _from_requests(run.requests, source)


def sampled(curve: Curve, max_points: int) -> tuple[Floats, Floats]:
    """The curve as (times in ns, values), at most `max_points` of them.

    A curve with more changes becomes time-weighted means over equal intervals, so its area stays right;
    each value then stands at the start of its interval.
    """
    if curve.times_ns.size <= max_points:
        return curve.times_ns.astype(np.float64), curve.values.astype(np.float64)
    edges = np.linspace(curve.times_ns[0], curve.times_ns[-1], max_points + 1)
    area = np.concatenate([[0.0], np.cumsum(np.diff(curve.times_ns) * curve.values[:-1], dtype=np.float64)])
    return edges[:-1], np.diff(np.interp(edges, curve.times_ns, area)) / np.diff(edges)


def _has_counts(run: Run) -> bool:
    return run.has("steps") and all(_known(run.steps, name) for name in ("num_waiting", "num_running"))


def _known(table: pa.Table, column: str) -> bool:
    """Whether at least one row has a value, so that a curve can be drawn."""
    return bool(table.num_rows > table.column(column).null_count)


def _from_requests(requests: pa.Table, entry: str) -> QueueLengths:
    entered, scheduled, finished = (_times(requests, name) for name in (entry, "scheduled_ns", "finish_ns"))
    return QueueLengths(
        waiting=_curve(np.concatenate([entered, scheduled]), _signs(entered, scheduled)),
        running=_curve(np.concatenate([scheduled, finished]), _signs(scheduled, finished)),
    )


def _from_steps(steps: pa.Table) -> QueueLengths:
    """The engine's counts after each schedule(); what finished with the step leaves when the step ends."""
    times: list[Ints] = []
    waiting: list[Ints] = []
    running: list[Ints] = []
    instances = _filled(steps.column("instance"), 0)
    for instance in np.unique(instances):
        rows = steps.filter(pa.array(instances == instance))
        at, wait, run = _instance_counts(rows)
        times.append(at)
        waiting.append(np.diff(wait, prepend=0))
        running.append(np.diff(run, prepend=0))
    at = np.concatenate(times)
    return QueueLengths(_curve(at, np.concatenate(waiting)), _curve(at, np.concatenate(running)))


def _instance_counts(steps: pa.Table) -> tuple[Ints, Ints, Ints]:
    """(times, waiting, running) of one instance: two rows per step, its schedule() and its end."""
    begin = pc.coalesce(steps.column("sched_ns"), steps.column("start_ns")).to_numpy()
    end = pc.coalesce(steps.column("update_ns"), steps.column("end_ns")).to_numpy()
    waiting, running = (_filled(steps.column(name), 0) for name in ("num_waiting", "num_running"))
    left = _filled(pc.list_value_length(steps.column("finished")), 0)
    # An asynchronous scheduler plans the next step before this one ends: its next counts already tell.
    idle = np.append(end[:-1] <= begin[1:], True)
    at = np.concatenate([begin, end[idle]])
    order = np.argsort(at, kind="stable")
    return (
        at[order],
        np.concatenate([waiting, waiting[idle]])[order],
        np.concatenate([running, (running - left)[idle]])[order],
    )


def _times(table: pa.Table, column: str) -> Ints:
    known: Ints = table.column(column).drop_null().to_numpy()
    return known


def _filled(column: pa.ChunkedArray, value: int) -> Ints:
    filled: Ints = pc.fill_null(column, value).to_numpy().astype(np.int64)
    return filled


def _signs(comes: Ints, goes: Ints) -> Ints:
    return np.concatenate([np.ones(comes.size, np.int64), np.full(goes.size, -1, np.int64)])


def _curve(times: Ints, changes: Ints) -> Curve:
    """Add up the changes at each distinct time."""
    at, where = np.unique(times, return_inverse=True)
    total = np.zeros(at.size, np.int64)
    np.add.at(total, where, changes)
    return Curve(at, np.cumsum(total))
