"""The end-to-end level where the two runs served different requests: distributions are compared, not pairs.

For two versions of a service under traffic of the same kind, or two halves of one recording. Without pairs the
sampling of the requests themselves is part of the doubt, so intervals are wide, and an error whose interval holds 0
is "not distinguishable": with nothing to find, that is missed in about 5 % of the checks (tests/fidelity/test_coverage.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.stats import FloatArray, Statistic
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.validate.e2e import QUANTILES, Clock, request_metrics
from kvtwin.validate.gates import NO_GATES, TIMES, Gates, judge
from kvtwin.validate.result import Check


def compare_unpaired(measured: Run, other: Run, *, name: str, clock: Clock, gates: Gates = NO_GATES) -> list[Check]:
    """Mean, p50, p90, p99 of TTFT, TPOT and latency of two runs with requests of their own.

    Args:
        measured, other: the two runs.
        name: the measured run's name.
        clock: see `e2e.request_metrics`.
        gates: see `gates.parse_gates`.

    Returns:
        Judged checks. Requests without a time are left out, and counted in the note.

    Raises:
        InputError: one of the runs knows none of the times; see also `e2e.request_metrics`.
    """
    sides = [request_metrics(run, clock) for run in (measured, other)]
    if not any(np.isfinite(values).any() for values in sides[0].values()):
        raise InputError("no request has a first token or a finish: nothing to compare", path=measured.path)
    checks = []
    for time in TIMES:
        one, two = (_Sample.of(side[f"{time}_ms"]) for side in sides)
        if len(one.values) and len(two.values):
            checks += _time_checks(time, one, two, name)
    return [_judge(check, gates) for check in checks]


@dataclass(frozen=True)
class _Sample:
    """The known values of one time in one run, in order of arrival."""

    values: FloatArray
    unknown: int

    @classmethod
    def of(cls, values: FloatArray) -> _Sample:
        known = values[np.isfinite(values)]
        return cls(known, len(values) - len(known))

    def statistics(self) -> dict[str, Statistic]:
        quantiles = {name: stats.quantile(self.values, q) for name, q in QUANTILES.items()}
        return {"mean": stats.mean(self.values), **quantiles}


def _time_checks(time: str, one: _Sample, two: _Sample, name: str) -> list[Check]:
    measured, other = one.statistics(), two.statistics()
    notes = ["unpaired"]
    if one.unknown or two.unknown:
        notes.append(f"{one.unknown} and {two.unknown} requests without this time left out")
    return [
        Check(
            run=name,
            level="e2e",
            metric=f"{time}_{key}",
            unit="ms",
            measured=measured[key].value,
            simulated=other[key].value,
            error=stats.relative_error(measured[key].value, other[key].value),
            interval=stats.ratio_interval(measured[key], other[key]),
            n=min(len(one.values), len(two.values)),
            note="; ".join([*notes, *(stats.describe(side[key], "requests") for side in (measured, other))]),
        )
        for key in measured
    ]


def _judge(check: Check, gates: Gates) -> Check:
    judged = judge(check, gates)
    if check.interval is not None and check.interval[0] <= 0 <= check.interval[1]:
        return replace(judged, verdict="not distinguishable")
    return judged
