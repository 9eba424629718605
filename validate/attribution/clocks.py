"""Whether the clocks of one run agree: the queue's with that of the steps, the steps' with that of the requests."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.stats import BatchStats, IntArray, durations_ns
from kvtwin.traces.run import Run
from kvtwin.validate.units import unit_note

_MIN_REQUESTS: Final = 5
_AT_ONCE: Final = 0.1  # of a step: a request that waits no longer was taken as soon as it came
_NEARLY_ALL: Final = 0.1  # the share that may be scheduled as the twin's are
_TOLERANCE_NS: Final = 1_000
_FEW: Final = 0.05
_ROUNDED: Final = 0.002


def queue_shift(waits: FloatArray, others: FloatArray, turn_ns: float) -> int:
    """By how many nanoseconds a run's `queued_ns` lies before where its dispatches put it; 0 where it does not.

    A request that comes to an engine with room is scheduled at the next turn. Those which the other run takes at once
    are taken at once by this one too, but for a few that meet a stall. If next to none is, and all wait about as long
    (the quartiles lie closer than half of it), then the engine is not late but a clock is wrong. A dispatch *before*
    its request is queued cannot be at all.

    Args:
        waits: of the run in question, from queue to dispatch, in ns, NaN where unknown.
        others: the same requests' in the other run.
        turn_ns: how long a step takes.
    """
    late = (waits - others)[np.isfinite(waits) & (others <= _AT_ONCE * turn_ns)]
    if len(late) < _MIN_REQUESTS:
        return 0
    low, quarter, middle, three, high = np.quantile(late, [_NEARLY_ALL, 0.25, 0.5, 0.75, 1 - _NEARLY_ALL])
    is_off = low > max(turn_ns / 2, _TOLERANCE_NS) or high < -max(_AT_ONCE * turn_ns, _TOLERANCE_NS)
    if not is_off or three - quarter > abs(middle) / 2:
        return 0
    return int(late[late >= middle - turn_ns / 2].min())


def waits(run: Run, dispatched_ns: FloatArray) -> FloatArray:
    """From queue to dispatch, in ns; NaN where unknown."""
    found: FloatArray = dispatched_ns - _floats(run.requests.column("queued_ns"))
    return found


def with_queue_moved(run: Run, shift_ns: int, dispatched_ns: FloatArray) -> Run:
    """The run with `queued_ns` later by `shift_ns`, but no later than the dispatch (stamps may have been cut at 0)."""
    if not shift_ns:
        return run
    requests = run.requests
    index = requests.schema.get_field_index("queued_ns")
    moved_ns = requests.column("queued_ns").to_numpy() + shift_ns
    moved_ns = np.where(moved_ns > dispatched_ns, dispatched_ns, moved_ns).astype(np.int64)
    moved = requests.set_column(index, requests.schema.field(index), pa.array(moved_ns))
    return Run(run.info, {"requests": moved, **({"steps": run.steps} if run.has("steps") else {})}, name="the run")


def steps_and_requests(run: Run) -> str | None:
    """A word on steps and requests of a run that cannot both be right; None where they agree.

    A token leaves the engine after the step that computed it has ended, and the scheduler takes it in after that.
    """
    if not run.has("steps"):
        return None
    steps = run.steps
    end_ns, update_ns = (steps.column(name) for name in ("end_ns", "update_ns"))
    known = update_ns.is_valid().to_numpy()
    late = (end_ns.to_numpy() > update_ns.fill_null(0).to_numpy() + _TOLERANCE_NS) & known
    lag = _floats(run.requests.column("finish_ns")) - _last_ns(run, end_ns.to_numpy())
    lag = lag[np.isfinite(lag)]
    early = lag < -_TOLERANCE_NS
    words = []
    if late.sum() > _FEW * max(known.sum(), 1):
        words.append(f"{late.sum():,} of {known.sum():,} steps end after the scheduler had taken in their tokens")
    if len(lag) and early.mean() > _FEW:
        words.append(f"{early.sum()} of {len(lag)} requests finish before the step that computes their last token ends")
    return f"steps and requests of the recording contradict one another: {', '.join(words)}" if words else None


def unit_of_requests(run: Run) -> str | None:
    """A word on a run whose requests take a unit's factor more or less than the steps that served them; else None."""
    if not run.has("steps"):
        return None
    steps, requests = run.steps, run.requests
    row, start_ns = _members(run, steps.column("start_ns").to_numpy())
    first_ns = np.full(requests.num_rows, np.nan)
    first_ns[row[::-1]] = start_ns[::-1]  # the earliest, since later assignments win
    served = _last_ns(run, steps.column("end_ns").to_numpy()) - first_ns
    said = _floats(requests.column("finish_ns")) - _floats(requests.column("scheduled_ns"))
    return unit_note(served, said, whose="requests' times are", beside="those of the steps that served them")


def steps_and_profile(run: Run, latency: LatencyModel) -> str | None:
    """A word on a simulated run whose steps take another time than its profile says; None where they agree."""
    if not run.has("steps"):
        return None
    taken = float(durations_ns(run.steps).sum())
    price = float(latency.step_ns(BatchStats.of_steps(run.steps), 0).sum())
    if abs(taken - price) <= _ROUNDED * price:
        return None
    return f"the predicted run's steps take {taken / price:.3f} x what its profile says of them: steps are believed"


def dispatches(run: Run, *, has_calls: bool) -> FloatArray:
    """When each request was first scheduled, in ns; NaN where it never was, or nobody knows.

    Args:
        run: any.
        has_calls: whether its steps tell when the scheduler was called; else `scheduled_ns` counts.
    """
    if not has_calls:
        return _floats(run.requests.column("scheduled_ns"))
    called = run.steps.column("sched_ns")
    row, at = _members(run, (run.steps.column("start_ns") if called.null_count else called).to_numpy())
    first = np.full(run.requests.num_rows, np.nan)
    first[row[::-1]] = at[::-1]  # the earliest, since later assignments win
    return first


def _last_ns(run: Run, step_ns: IntArray) -> FloatArray:
    """Of each request the time of its last step; NaN without one, and where that is not known to be its last."""
    row, at = _members(run, step_ns)
    last = np.full(run.requests.num_rows, np.nan)
    ended = run.steps.column("finished").combine_chunks()
    if ended.null_count:
        last[row] = at
        return last
    # An engine that schedules ahead may run a request once more; the log says with which step it finished.
    last[ended.flatten().to_numpy()] = np.repeat(step_ns, np.diff(ended.offsets.to_numpy()))
    return last


def _members(run: Run, step_ns: IntArray) -> tuple[IntArray, IntArray]:
    """Request and time of each place in each batch."""
    members = run.steps.column("request").combine_chunks()
    return members.flatten().to_numpy(), np.repeat(step_ns, np.diff(members.offsets.to_numpy()))


def _floats(column: pa.ChunkedArray) -> FloatArray:
    """Nanoseconds as floats, NaN for null."""
    values: FloatArray = column.cast(pa.float64(), safe=False).to_numpy()
    return values
