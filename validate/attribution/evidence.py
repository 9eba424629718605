"""Which layers are seen to differ from the recording by themselves, whatever that does end to end.

End to end, a queue turns small differences into large ones, so the largest bar of a waterfall may be chance. Only a
layer with evidence of its own is blamed. Each piece of evidence is an `Attribution` of one part: its own measure, which
is right or wrong whatever becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvtwin.calibrate.stats import Interval
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.traces.run import Run
from kvtwin.validate.arrivals import way_check, way_difference
from kvtwin.validate.attribution.hybrids import CACHE_AND_SCHEDULE, OUTPUT, Twin
from kvtwin.validate.e2e import output_check
from kvtwin.validate.result import Attribution, Check, Part, ScheduleFinding

DECIDED: Final = ("cache", "schedule", CACHE_AND_SCHEDULE, OUTPUT)  # layers that are right or wrong, without noise
ARRIVAL: Final = "arrival"
_LATE: Final = 0.05  # of the requests: so many a client may send late that has to wait for something
_HIDING: Final = 2.0  # steps that take so many times longer say nothing of the way to the queue
_SURE: Final = 2.58  # standard errors: 1 % by chance
_LONGER: Final = _SURE / 1.96  # what a 99 % interval is longer than a 95 % one
_FEW_HITS: Final = 0.005  # hits may move a little with the moment of an admission
_FOLLOWS: Final = 0.1  # of the differing steps: what is left of them with recorded hits, where hits were the cause


def arrival(measured: Run, twin: Twin, shift_ns: int, checks: Sequence[Check], name: str) -> list[Attribution]:
    """The way to the queue by what it adds to the client's TTFT; and who was sent at other times than was planned.

    Args:
        measured: the recording, its queue's clock put right.
        twin: what predicts it.
        shift_ns: by how much the queue's clock of either is wrong (`clocks.queue_shift`).
        checks: of the steps (slower ones let requests wait longer for the loop), and of the times of sending.
        name: the recording's.
    """
    rows = [
        _alone(check, ARRIVAL, ARRIVAL if -check.error > _LATE else None)
        for check in checks
        if check.metric == "identical_arrivals"
    ]
    check = way_check(measured, twin.run, name=name)
    if check is None or not np.isfinite(check.error):
        return rows
    slower = 1 + max((check.error for check in checks if check.metric == "step_bias"), default=0.0)
    hidden = slower > _HIDING  # requests wait as much longer for the loop
    difference = None if hidden else way_difference(measured, twin.run, slower=max(slower, 1.0))
    return [_alone(check, ARRIVAL, ARRIVAL if shift_ns or difference else None, difference or ""), *rows]


def step_times(checks: Sequence[Check], note: str) -> list[Attribution]:
    """The total of the predicted step times."""
    bias = next((check for check in checks if check.metric == "step_bias"), None)
    if bias is None or not np.isfinite(bias.error):
        return []
    return [_alone(bias, "step times", "step times" if _is_sure(bias) else None, note)]


def decisions(
    measured: Run, twin: Twin, replayed: Run | None, schedule: ScheduleFinding | None, with_hits: ScheduleFinding | None
) -> list[Attribution]:
    """Steps decided as recorded, at the recorded times; and hits, where decisions follow from them.

    Args:
        measured, twin: as above.
        replayed: the simulated scheduler under the recording's clock.
        schedule: it beside the recording.
        with_hits: the same with the recorded hits; None where they cannot be set, or are the same.
    """
    if schedule is None:
        return []
    layer = "schedule" if isinstance(twin.config, VllmConfig) else CACHE_AND_SCHEDULE
    differing = schedule.num_steps - schedule.num_identical
    if with_hits is not None and with_hits.num_steps - with_hits.num_identical < _FOLLOWS * differing:
        layer = "cache"
    error = -differing / schedule.num_steps
    blamed = layer if differing else None
    rows = [_row(schedule.run, "identical_steps", "steps", schedule.num_steps, error, layer, blamed)]
    if replayed is not None and (hits := _hits(measured, replayed)) is not None:
        recorded, simulated, differ = hits
        cause = layer if layer != "schedule" else "cache"
        is_cause = differing and layer != "schedule" and differ
        rows.append(
            _row(
                schedule.run,
                "cached_tokens",
                "tokens",
                recorded,
                simulated / recorded - 1,
                cause,
                cause if is_cause else None,
            )
        )
    return rows


def output_lengths(measured: Run, twin: Twin, name: str) -> list[Attribution]:
    """Requests that generate as many tokens as recorded; none where all do."""
    check = output_check(measured, twin.run, name=name)
    return [] if check is None else [_alone(check, OUTPUT, OUTPUT)]


def is_doubtful(check: Check) -> bool:
    """Whether the error may be none: within the noise floor, or with an interval that holds 0."""
    if check.verdict == "not distinguishable":
        return True
    return check.interval is not None and holds_zero(check.interval)


def holds_zero(interval: Interval) -> bool:
    """Whether the bar may be none."""
    return interval[0] <= 0 <= interval[1]


def _is_sure(check: Check) -> bool:
    """Beyond the noise floor and a 99 % interval."""
    if check.verdict == "not distinguishable" or check.error == 0:
        return False
    low, high = check.interval or (check.error, check.error)
    wide = (check.error - _LONGER * (check.error - low), check.error + _LONGER * (high - check.error))
    return not holds_zero(wide)


def _alone(check: Check, layer: str, blamed: str | None, note: str = "") -> Attribution:
    """A check whose error is all one layer's."""
    part = Part(layer, check.error, check.interval)
    note = "; ".join(filter(None, (note, check.note)))
    return Attribution(check.run, check.metric, check.unit, check.measured, check.simulated, (part,), blamed, note)


def _row(
    run: str, metric: str, unit: str, measured: float, error: float, layer: str, blamed: str | None
) -> Attribution:
    return Attribution(run, metric, unit, measured, measured * (1 + error), (Part(layer, error),), blamed)


def _hits(measured: Run, replayed: Run) -> tuple[float, float, bool] | None:
    """Recorded and simulated tokens hit, and whether requests differ; None where neither run knows a hit."""
    recorded, simulated = (run.requests.column("cached_tokens") for run in (measured, replayed))
    both = recorded.is_valid().to_numpy() & simulated.is_valid().to_numpy()
    one, two = (column.fill_null(0).to_numpy()[both] for column in (recorded, simulated))
    if not one.sum():
        return None
    return float(one.sum()), float(two.sum()), bool(np.abs(one - two).sum() > _FEW_HITS * max(one.sum(), two.sum()))
