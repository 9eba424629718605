"""Which layers are seen to differ from the recording by themselves, whatever that does end to end.

End to end, a queue turns small differences into large ones, so the largest bar of a waterfall may be chance. Only a
layer with evidence of its own is blamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.sim.latency.stats import durations_ns
from kvtwin.traces.run import Run
from kvtwin.validate.attribution.hybrids import CACHE_AND_SCHEDULE, Twin
from kvtwin.validate.result import Check, ScheduleFinding

DECIDED: Final = ("cache", "schedule", CACHE_AND_SCHEDULE)  # layers that are right or wrong, without noise
_SURE: Final = 2.58  # standard errors: 1 % by chance
_FEW_HITS: Final = 0.005  # hits may move a little with the moment of an admission


def suspects(
    measured: Run, twin: Twin, replayed: Run | None, schedule: ScheduleFinding | None, checks: Sequence[Check]
) -> set[str]:
    """The layers that differ.

    arrival: requests reach the queue at other times than recorded. cache: at the recorded times, other hits. step
    times: the total of the predicted steps is off, beyond its interval and the noise floor. schedule: at the recorded
    times, other decisions. host: where decisions are the same, whatever time is left over counts as the host's.
    """
    found = set()
    if _arrives_differently(measured, twin):
        found.add("arrival")
    if replayed is not None and _hits_differently(measured, replayed):
        found.add("cache")
    bias = next((check for check in checks if check.metric == "step_bias"), None)
    if bias is not None and not is_doubtful(bias):
        found.add("step times")
    if schedule is not None and schedule.num_identical < schedule.num_steps:
        found |= {"schedule", CACHE_AND_SCHEDULE}
    elif schedule is not None:
        found.add("host")
    return found


def is_doubtful(check: Check) -> bool:
    """Whether the error may be none: within the noise floor, or with an interval that holds 0."""
    if check.verdict == "not distinguishable":
        return True
    return check.interval is not None and check.interval[0] <= 0 <= check.interval[1]


def _arrives_differently(measured: Run, twin: Twin) -> bool:
    """Whether the mean way to the queue differs by more than chance, and by more than the engine's loop can hide."""
    delays = []
    for run in (measured, twin.run):
        arrival, queued = (run.requests.column(name) for name in ("arrival_ns", "queued_ns"))
        if queued.null_count:
            return False
        delays.append((queued.to_numpy() - arrival.to_numpy()).astype(np.float64))
    difference = delays[1] - delays[0]
    if len(difference) < 2 or not difference.any():
        return False
    error = stats.standard_error(difference)
    turn = float(np.median(durations_ns(measured.steps))) / 2 if measured.has("steps") else 0.0
    return bool(abs(difference.mean()) > max(_SURE * error, turn))


def _hits_differently(measured: Run, replayed: Run) -> bool:
    recorded, simulated = (run.requests.column("cached_tokens") for run in (measured, replayed))
    both = recorded.is_valid().to_numpy() & simulated.is_valid().to_numpy()
    one, two = (column.fill_null(0).to_numpy()[both] for column in (recorded, simulated))
    return bool(np.abs(one - two).sum() > _FEW_HITS * max(one.sum(), two.sum()))
