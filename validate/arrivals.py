"""The way of requests to the engine: when they were sent, and how long they took to its queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.calibrate import noise, stats
from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.stats import durations_ns
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.result import Check
from kvtwin.validate.units import unit_note

Rows = npt.NDArray[np.bool_]

_SURE: Final = 2.58  # standard errors: 1 % by chance
_ALIKE: Final = 0.75  # of a shift: what the middle half of its values spans at most; if uniform from 0, it spans 1
_GAP: Final = 0.5  # of the distance of two groups' middles: what lies empty between them
_FEWEST: Final = 0.05  # the share of requests that makes a group
_MIN_REQUESTS: Final = 10
_TOLD_NS: Final = 1_000
_SAME_NS: Final = 1_000_000  # sent at the same time, as far as clients and files of milliseconds tell


def way_check(measured: Run, simulated: Run, *, name: str, repeats: Sequence[Run] = ()) -> Check | None:
    """Mean time from sending to first token, without the wait to be scheduled, were only the way to the queue simulated.

    What the queue's clock does not see: an arrival clock that is off, or a frontend that takes another time. The wait
    is left out because under overload it grows without bound, and any shift would be small beside it.

    Args:
        measured, simulated: the same requests in the same order.
        name: the recorded run's name.
        repeats: all recordings of this workload, requests in that order; fewer than two show no noise among themselves.

    Returns:
        The check, not judged. Its noise floor is what the turns of the engine's loop can do (half a step), or what
        repeats differ if that is more. None where either run does not know both stamps of a request, or the simulation
        lets no request take any time.
    """
    way, other = _way_ns(measured), _way_ns(simulated)
    seen = _unqueued_ns(measured)
    known = np.isfinite(seen) & np.isfinite(way) & np.isfinite(other)
    if not known.any() or not other[known].any():
        return None
    seen, simulated_ms = seen[known] / NS_PER_MS, (seen - way + other)[known] / NS_PER_MS
    error, mean = stats.ratio_of_sums(simulated_ms, seen), float(seen.mean())
    floors = [turn_ns(measured) / NS_PER_MS / 2 / mean]
    again = [values[np.isfinite(values)] for values in map(_unqueued_ns, repeats)]
    among_repeats = noise.rms_floor([float(values.mean()) for values in again if len(values)])
    floors += [] if among_repeats is None else [among_repeats]
    return Check(
        name, "e2e", "ttft_arrival", "ms", mean, float(simulated_ms.mean()), error.value, stats.interval(error),
        int(known.sum()), noise_floor=max(floors),
        note="from sending to first token without the wait to be scheduled; only the way from arrival_ns to queued_ns "
        f"is simulated; {stats.describe(error, 'requests')}",
    )  # fmt: skip


def way_difference(measured: Run, simulated: Run, *, slower: float = 1.0) -> str | None:
    """In words, by how much the way to the queue differs, of all requests or of some; None where chance can explain it.

    A loop that takes requests at other turns, or a busy frontend, delays each by another time. A clock that is off
    shifts all by about the same, or a group of them: then nothing lies between the groups.

    Args:
        measured, simulated: the same requests in the same order.
        slower: by what factor simulated steps are longer: requests wait as much longer for the loop.
    """
    difference = _way_ns(measured) - _way_ns(simulated)
    if len(difference) < 2 or not np.isfinite(difference).all() or not difference.any():
        return None
    least_ns = max(_SURE * stats.standard_error(difference), slower * turn_ns(measured) / 2)
    low, middle, high = np.quantile(difference, [0.25, 0.5, 0.75])
    if min(abs(difference.mean()), abs(middle)) > least_ns and high - low < _ALIKE * abs(middle):
        return f"the way from arrival_ns to queued_ns takes {_longer(middle)} than simulated"
    return _of_some(difference, slower * _met_ns(measured))


def _of_some(difference: FloatArray, loop_ns: float) -> str | None:
    """The same where some requests differ in it from the others: two groups, or a stretch of time.

    Requests that come during one step wait together for its end: groups that are no further apart are the loop's.
    """
    for some in (two_groups(difference), _stretch(difference)):
        if some is None:
            continue
        middles = [float(np.median(difference[rows])) for rows in (some, ~some)]
        if abs(middles[0]) < abs(middles[1]):
            some, middles = ~some, middles[::-1]
        apart = middles[0] - middles[1]
        if abs(apart) > loop_ns:
            return (
                f"the way from arrival_ns to queued_ns takes {some.sum()} of {len(some)} requests {_longer(apart)} "
                "than the others"
            )
    return None


def _stretch(values: FloatArray) -> Rows | None:
    """Where rows one after another differ from those before and after them by more than each of the two varies.

    The stretch lies between the ends of the cumulated sum of deviations (Levin and Kline 1985).
    """
    path = np.cumsum(values - values.mean())
    first, last = sorted((int(np.argmin(path)), int(np.argmax(path))))
    inside = np.zeros(len(values), np.bool_)
    inside[first + 1 : last + 1] = True
    parts = values[inside], values[~inside]
    if min(map(len, parts)) < max(_MIN_REQUESTS, _FEWEST * len(values)):
        return None
    apart = abs(float(np.median(parts[0]) - np.median(parts[1])))
    spreads = [float(np.subtract(*np.quantile(part, [0.75, 0.25]))) for part in parts]
    return inside if max(spreads) < _ALIKE * apart else None


def two_groups(values: FloatArray) -> Rows | None:
    """Which values are in the lower of two groups with nothing between; None where there is one group only.

    Args:
        values: shape (n,), finite.

    Returns:
        Shape (n,). Each group has a twentieth of the values, and ten; the gap is half of what their medians are apart.

    >>> two_groups(np.array([0.0, 50, 1] * 10))[:3].tolist()
    [True, False, True]
    """
    fewest = max(_MIN_REQUESTS, int(_FEWEST * len(values)))
    ordered = np.sort(values)
    if len(values) < 2 * fewest:
        return None
    gaps = np.diff(ordered)[fewest - 1 : len(values) - fewest]
    cut = fewest + int(np.argmax(gaps))
    gap, apart = float(gaps.max()), float(np.median(ordered[cut:]) - np.median(ordered[:cut]))
    lower: Rows = values < ordered[cut]
    return lower if gap > _GAP * apart else None


def sent_check(measured: Run, other: Run, what: str, *, name: str) -> Check | None:
    """How many requests were sent when another run says so, but for a difference that is the same for all.

    Such a difference may be another origin of the clock, and changes nothing that counts from a request's own stamps:
    it is no error, and told in the note. Nor is half a step, which a busy client may be late and an engine hardly sees.

    Args:
        measured, other: the same requests in the same order.
        what: what the other run is, for the note.
        name: the recorded run's name.

    Returns:
        The check, not judged; None where all were sent at the same time.
    """
    offsets_ns = np.asarray(pc.subtract(measured.requests.column("arrival_ns"), other.requests.column("arrival_ns")))
    if (np.abs(offsets_ns) <= _SAME_NS).all():
        return None
    middle, n = float(np.median(offsets_ns)), len(offsets_ns)
    away_ns = np.abs(offsets_ns - middle)
    same = int((away_ns <= max(_SAME_NS, turn_ns(measured) / 2)).sum())
    side = f"{abs(middle) / NS_PER_MS:,.3f} ms {'after' if middle > 0 else 'before'} that of {what}"
    if same == n:
        within = f" but for {away_ns.max() / NS_PER_MS:,.3f} ms" if away_ns.max() >= _TOLD_NS else ""
        note = (
            f"arrival_ns lies {side}, of all alike{within}: another origin of the clock, or one of the two is shifted"
        )
    else:
        ends = " to ".join(f"{float(end) / NS_PER_MS:+,.3f}" for end in (offsets_ns.min(), offsets_ns.max()))
        note = f"arrival_ns lies {side} (median, from {ends} ms): {n - same} of {n} requests were sent at other times"
        gaps = [np.diff(_floats(run, "arrival_ns")) for run in (other, measured)]
        warning = unit_note(*gaps, whose="times between arrivals are", beside="those of " + what)
        note = "; ".join([*([warning] if warning else []), note])
    return Check(name, "e2e", "identical_arrivals", "requests", float(n), float(same), same / n - 1, None, n, note=note)


def turn_ns(run: Run) -> float:
    """How long a step typically takes: by the steps, or by what lies between two tokens; 0 where nothing tells."""
    if run.has("steps"):
        return float(np.median(durations_ns(run.steps)))
    first, finish = (_floats(run, name) for name in ("first_token_ns", "finish_ns"))
    tokens = run.requests.column("output_tokens").to_numpy()
    known = (tokens > 1) & np.isfinite(finish - first)
    return float(np.median((finish - first)[known] / (tokens[known] - 1))) if known.any() else 0.0


def _met_ns(run: Run) -> float:
    """How long the longer ones of the steps are that run when requests come (nine of ten are shorter)."""
    queued = run.requests.column("queued_ns")
    if not run.has("steps") or queued.null_count:
        return turn_ns(run)
    before = np.searchsorted(run.steps.column("start_ns").to_numpy(), queued.to_numpy()) - 1
    return float(np.quantile(durations_ns(run.steps)[np.maximum(before, 0)], 0.9))


def _longer(ns: float) -> str:
    return f"{abs(ns) / NS_PER_MS:.3f} ms {'longer' if ns > 0 else 'less'}"


def _unqueued_ns(run: Run) -> FloatArray:
    """From sending to first token, less the wait to be scheduled where that is known; NaN where unknown."""
    arrival, queued, scheduled, first = (
        _floats(run, name) for name in ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns")
    )
    wait = scheduled - queued
    # A way that a wrong clock makes negative counts by its size: beside a sum near zero no error says anything.
    found: FloatArray = first - queued - np.where(np.isfinite(wait), np.maximum(wait, 0), 0) + np.abs(queued - arrival)
    return found


def _way_ns(run: Run) -> FloatArray:
    """From arrival_ns to queued_ns, NaN where either is unknown."""
    way: FloatArray = _as_floats(pc.subtract(run.requests.column("queued_ns"), run.requests.column("arrival_ns")))
    return way


def _floats(run: Run, name: str) -> FloatArray:
    """A column of times, from the first arrival on: floats hold such spans exactly, epoch nanoseconds they do not."""
    return _as_floats(pc.subtract(run.requests.column(name), pc.min(run.requests.column("arrival_ns"))))


def _as_floats(column: pa.ChunkedArray) -> FloatArray:
    values: FloatArray = column.cast(pa.float64(), safe=False).to_numpy()
    return values
