"""Time between steps -> HostTime: what the engine's own process adds to every step.

An engine that waits for each step before it plans the next one (synchronous scheduling) shows its host time in full:

    sched_ns        start_ns             end_ns     update_ns        sched_ns of the next step
       | schedule part |      model         |          update part          |

An asynchronous engine plans while the device runs, so there both parts are hidden and only the device's idle time
between two steps launched back to back, `gap_ns`, can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.robust import fit_nonnegative
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.stats import IntArray
from kvtwin.traces.run import Run

_MIN_PAIRS: Final = 20  # pairs of steps; fewer say nothing reliable about a line in the number of requests


@dataclass(frozen=True)
class _Pairs:
    """Consecutive steps between which the engine did not wait for work: arrays of shape (n,).

    Attributes:
        requests, next_requests: batch sizes of the step and of the one that follows.
        update_ns: from the step's end to the next schedule().
        schedule_ns: from that schedule() to the next step's start.
        gap_ns: from the step's end to the next one's start; negative where a device's queue overlaps them.
    """

    requests: IntArray
    next_requests: IntArray
    update_ns: IntArray
    schedule_ns: IntArray
    gap_ns: IntArray

    @classmethod
    def of(cls, run: Run) -> _Pairs | None:
        """None where the run does not say when schedule() was called."""
        steps = run.steps
        if steps.column("sched_ns").null_count:
            return None
        sched, start, end = (steps.column(name).to_numpy() for name in ("sched_ns", "start_ns", "end_ns"))
        sizes = np.diff(steps.column("request").combine_chunks().offsets.to_numpy()).astype(np.int64)
        pairs = cls(sizes[:-1], sizes[1:], sched[1:] - end[:-1], start[1:] - sched[1:], start[1:] - end[:-1])
        return pairs.where(_goes_on(steps))

    @property
    def is_asynchronous(self) -> bool:
        """Most steps are planned before the one ahead of them has ended."""
        return len(self.update_ns) > 0 and float(np.mean(self.update_ns < 0)) > 0.5

    def where(self, keep: npt.NDArray[np.bool_]) -> _Pairs:
        """The pairs that are kept."""
        return _Pairs(*(getattr(self, item.name)[keep] for item in fields(self)))


def fit_host_time(runs: Sequence[Run]) -> tuple[HostTime, str]:
    """Host time of the engine that made these recordings, and one line on what it rests on.

    Pairs of steps count where a member of the batch goes on in the next step: the engine then had work all along.
    After a wait for an arrival no member can go on, so idle time never counts (on the twelve recordings of
    vllm-cpu-tiny this agrees with the numbers waiting and running at every step).

    The parts are lines in the number of requests, fitted towards the **mean** with bounded influence of stalls
    (`robust.fit_nonnegative`): a simulation adds host times up over thousands of steps, and a median would lose the
    ordinary upper tail (2 to 10 % of the time in these recordings). Only what deviates by more than three standard
    deviations is cut, which would otherwise tilt the line.
    """
    found = [pairs for run in runs if (pairs := _Pairs.of(run)) is not None]
    if not found:
        return HostTime(), "none: the recordings do not say when schedule() was called"
    pairs = _joined(found)
    if pairs.is_asynchronous:
        gaps = pairs.gap_ns[pairs.gap_ns > 0]
        gap_ns = round(float(np.median(gaps))) if len(gaps) else 0
        note = f"median of {len(gaps)} positive gaps between back-to-back steps of an asynchronous engine"
        return HostTime(gap_ns=gap_ns), note
    host = _fit(pairs)
    if host is None:
        return HostTime(), f"none: only {len(pairs.requests)} pairs of steps without a wait, {_MIN_PAIRS} are needed"
    return host, f"fitted on {len(pairs.requests)} pairs of steps without a wait between them"


def host_accuracy(runs: Sequence[Run]) -> dict[str, Any]:
    """Hold-out errors of the whole time between steps that a synchronous engine shows: each run predicted from the
    others. Empty for asynchronous engines, a single run, or recordings that do not show it.
    """
    found = [pairs for run in runs if (pairs := _Pairs.of(run)) is not None]
    if len(found) < 2 or _joined(found).is_asynchronous:
        return {}
    measured, predicted = [], []
    for index, pairs in enumerate(found):
        host = _fit(_joined([*found[:index], *found[index + 1 :]]))
        seen = pairs.where(pairs.gap_ns > 0)
        if host is not None:
            measured.append(seen.gap_ns)
            predicted.append(_between(host, seen))
    if not measured:
        return {}
    return {"time between steps": summarize(np.concatenate(measured), np.concatenate(predicted))}


def _between(host: HostTime, pairs: _Pairs) -> IntArray:
    update = host.update_ns + host.update_per_req_ns * pairs.requests
    schedule = host.schedule_ns + host.schedule_per_req_ns * pairs.next_requests
    total: IntArray = update + schedule
    return total


def _fit(pairs: _Pairs) -> HostTime | None:
    """Both lines; None for too few pairs."""
    usable = pairs.where((pairs.update_ns > 0) & (pairs.schedule_ns > 0))
    if len(usable.requests) < _MIN_PAIRS:
        return None
    schedule_ns, schedule_per_req_ns = _line(usable.next_requests, usable.schedule_ns)
    update_ns, update_per_req_ns = _line(usable.requests, usable.update_ns)
    return HostTime(schedule_ns, schedule_per_req_ns, update_ns, update_per_req_ns)


def _line(requests: IntArray, times_ns: IntArray) -> tuple[int, int]:
    design: FloatArray = np.column_stack([np.ones(len(requests)), requests])
    fixed, per_req = fit_nonnegative(design, times_ns.astype(np.float64)).tolist()
    return round(fixed), round(per_req)


def _joined(parts: Sequence[_Pairs]) -> _Pairs:
    return _Pairs(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(_Pairs)))


def _goes_on(steps: pa.Table) -> npt.NDArray[np.bool_]:
    """Whether a member of each step's batch (but the last step's) is also in the next one's: shape (n - 1,)."""
    request = steps.column("request").combine_chunks()
    members = np.column_stack([np.asarray(request.value_parent_indices()), request.flatten().to_numpy()]).astype(
        np.int64
    )
    width = int(members[:, 1].max(initial=0)) + 1
    here = members[:, 0] * width + members[:, 1]
    stays = np.isin(here + width, here)
    goes_on = np.zeros(steps.num_rows, np.bool_)
    goes_on[members[stays, 0]] = True
    return goes_on[:-1]
