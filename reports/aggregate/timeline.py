"""Requests waiting, requests running and KV blocks in use over time, from a run's steps or its requests.

A curve is right-continuous: `values[i]` holds from `times_ns[i]` until `times_ns[i + 1]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.reports.aggregate.document import Envelope, EnvelopePair, Timeline
from kvtwin.reports.aggregate.sampling import Ints, rounded, rounded_one
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_S, to_seconds

Source = Literal["steps", "queued_ns", "arrival_ns"]

NUM_INTERVALS: Final = 360  # about one per three pixels


@dataclass(frozen=True, slots=True)
class Curve:
    """A count over time.

    Attributes:
        times_ns: strictly increasing, on the run's own clock; at least one.
        values: the count from that time on; 0 before.
    """

    times_ns: Ints
    values: Ints


def timeline(measured: Run, simulated: Run) -> Timeline | None:
    """Both runs on one grid; None where one of them has neither queue lengths nor scheduling times."""
    source = common_source(measured, simulated)
    if source is None:
        return None
    runs = (measured, simulated)
    starts = [int(run.requests["arrival_ns"][0].as_py()) for run in runs]
    span = max(_last_ns(run, source) - start for run, start in zip(runs, starts, strict=True))
    edges = np.linspace(0, max(span, 1), NUM_INTERVALS + 1)
    sides = [
        {name: envelope(curve, edges + start) for name, curve in run_curves(run, source)}
        for run, start in zip(runs, starts, strict=True)
    ]
    names = [name for name in ("running", "waiting", "kv_blocks") if any(name in side for side in sides)]
    counts = {name: EnvelopePair(*(side.get(name) for side in sides)) for name in names}
    return Timeline(source, rounded_one(to_seconds(float(edges[1])), 8), counts)


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


def run_curves(run: Run, source: Source) -> Iterator[tuple[str, Curve]]:
    """The curves of one run, one at a time: "running", "waiting" and, from steps that know it, "kv_blocks".

    From requests, one that was never scheduled (or never finished) waits (or runs) to the end, and a
    preempted one counts as running; from steps it waits again.
    """
    return _from_steps(run.steps) if source == "steps" else _from_requests(run.requests, source)


def envelope(curve: Curve, edges: np.typing.NDArray[np.float64]) -> Envelope:
    """The curve's mean, smallest and largest value in each interval between two `edges` (ns, increasing)."""
    times = np.concatenate([[min(float(edges[0]), float(curve.times_ns[0])) - NS_PER_S], curve.times_ns])
    values = np.concatenate([[0], curve.values])
    area = np.concatenate([[0.0], np.cumsum(np.diff(times) * values[:-1])])
    held = np.searchsorted(times, edges, side="right") - 1  # the change in force at each edge
    area_at = area[held] + (edges - times[held]) * values[held]
    # Slices of `values` that hold at some moment of the interval; a spare element lets the last one end at the end.
    slices = np.column_stack([held[:-1], np.searchsorted(times, edges[1:], side="left")]).ravel()
    padded = np.append(values, values[-1])
    extent = float(curve.times_ns[-1] - curve.times_ns[0])
    average = float(np.sum(np.diff(curve.times_ns) * curve.values[:-1])) / extent if extent else float("nan")
    return Envelope(
        mean=rounded(np.diff(area_at) / np.diff(edges)),
        low=np.minimum.reduceat(padded, slices)[::2].tolist(),
        high=np.maximum.reduceat(padded, slices)[::2].tolist(),
        average=rounded_one(average),
        peak=int(curve.values.max()),
    )


def _has_counts(run: Run) -> bool:
    return run.has("steps") and all(_known(run.steps, name) for name in ("num_waiting", "num_running"))


def _known(table: pa.Table, column: str) -> bool:
    """Whether at least one row has a value, so that a curve can be drawn."""
    return bool(table.num_rows > table.column(column).null_count)


def _last_ns(run: Run, source: Source) -> int:
    """When the last curve ends."""
    if source != "steps":
        return max(int(pc.max(run.requests[name]).as_py()) for name in (source, "scheduled_ns", "finish_ns"))
    return int(max(_begin(run.steps).max(), _end(run.steps).max()))


def _from_requests(requests: pa.Table, entry: str) -> Iterator[tuple[str, Curve]]:
    columns = (requests[name].drop_null().to_numpy() for name in (entry, "scheduled_ns", "finish_ns"))
    entered, scheduled, finished = columns
    yield "running", _balance(scheduled, finished)
    yield "waiting", _balance(entered, scheduled)


def _balance(comes: Ints, goes: Ints) -> Curve:
    """How many have come and not gone."""
    changes = np.concatenate([np.ones(comes.size, np.int64), np.full(goes.size, -1, np.int64)])
    return _sum_of_changes(np.concatenate([comes, goes]), changes)


def _from_steps(steps: pa.Table) -> Iterator[tuple[str, Curve]]:
    """The engine's counts after each schedule(), over all instances."""
    instance = pc.fill_null(steps["instance"], 0).to_numpy()
    rows = [
        steps if (instance == name).all() else steps.filter(pa.array(instance == name)) for name in np.unique(instance)
    ]
    for name in ("running", "waiting"):
        yield name, _add_up([_queue(part, f"num_{name}") for part in rows])
    if _known(steps, "num_free_blocks"):
        yield "kv_blocks", _add_up([_blocks_in_use(part) for part in rows])


def _queue(steps: pa.Table, column: str) -> Curve:
    """A count of one instance; what finished with a step leaves when the step ends."""
    begin, end = _begin(steps), _end(steps)
    counted = _filled(steps[column])
    after = counted - _filled(pc.list_value_length(steps["finished"])) if column == "num_running" else counted
    # An asynchronous scheduler plans the next step before this one ends: its next counts already tell.
    idle = np.append(end[:-1] <= begin[1:], True)
    return _sorted(np.concatenate([begin, end[idle]]), np.concatenate([counted, after[idle]]))


def _blocks_in_use(steps: pa.Table) -> Curve:
    """The most blocks ever seen free, less those free now: the engine's capacity, where it was ever idle."""
    known = steps.filter(steps["num_free_blocks"].is_valid())
    free = _filled(known["num_free_blocks"])
    return _sorted(_begin(known), int(free.max(initial=0)) - free)


def _begin(steps: pa.Table) -> Ints:
    begin: Ints = pc.coalesce(steps["sched_ns"], steps["start_ns"]).to_numpy()
    return begin


def _end(steps: pa.Table) -> Ints:
    end: Ints = pc.coalesce(steps["update_ns"], steps["end_ns"]).to_numpy()
    return end


def _filled(column: pa.ChunkedArray) -> Ints:
    filled: Ints = pc.fill_null(column, 0).to_numpy().astype(np.int64)
    return filled


def _sorted(times: Ints, values: Ints) -> Curve:
    """By time; of several values at one time the last holds."""
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    last = np.append(times[1:] != times[:-1], True)
    return Curve(times[last], values[last])


def _add_up(curves: list[Curve]) -> Curve:
    """The sum of the curves of several instances."""
    if len(curves) == 1:
        return curves[0]
    changes = [np.diff(curve.values, prepend=0) for curve in curves]
    return _sum_of_changes(np.concatenate([curve.times_ns for curve in curves]), np.concatenate(changes))


def _sum_of_changes(times: Ints, changes: Ints) -> Curve:
    """Add up changes in the order of time."""
    order = np.argsort(times, kind="stable")
    return _sorted(times[order], np.cumsum(changes[order]))
