"""A recording against aggregates: all that some simulators and benchmarks publish (`traces.readers.summary`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.stats import FloatArray, Interval, Statistic
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.summary import Summary
from kvtwin.traces.run import Run
from kvtwin.validate.e2e import QUANTILES, Clock, request_metrics, throughput
from kvtwin.validate.gates import NO_GATES, TIMES, Gates, judge
from kvtwin.validate.result import Check

NO_PAIRS: Final = "aggregates only: no pairs of requests, and the interval is the recording's own doubt"


def compare_summary(
    measured: Run, summary: Summary, *, name: str, clock: Clock, gates: Gates = NO_GATES
) -> list[Check]:
    """Mean, p50, p90 and p99 of TTFT, TPOT and latency, and the throughput, as far as the summary has them.

    There are no pairs of requests, and nothing is known of the summary's own spread: an interval holds the doubt of the
    recording alone. Whether the summary counts from the client or from the engine's queue it does not say.

    Args:
        measured: the recording.
        summary: what is judged.
        name: the recording's name.
        clock: what the recording's times count from, see `e2e.request_metrics`.
        gates: see `gates.parse_gates`.

    Raises:
        InputError: the recording knows none of the summary's metrics.
    """
    times = request_metrics(measured, clock)
    note = _note(measured, summary)
    statistics = {"mean": stats.mean, **{key: _quantile(q) for key, q in QUANTILES.items()}}
    checks = []
    for time in TIMES:
        values = times[f"{time}_ms"]
        values = values[np.isfinite(values)]
        for key, statistic in statistics.items():
            metric = f"{time}_{key}"
            if len(values) and metric in summary.metrics:
                found = statistic(values)
                spread = stats.interval(found)
                checks.append(_check(name, metric, "ms", found.value, summary, spread, len(values), note))
    rate = throughput(measured, clock)
    if np.isfinite(rate) and "throughput" in summary.metrics:
        checks.append(_check(name, "throughput", "tokens/s", rate, summary, None, measured.requests.num_rows, note))
    if not checks:
        problem = f"has {', '.join(summary.metrics)} only, of which the recording knows nothing"
        raise InputError(problem, path=summary.path)
    return [judge(check, gates) for check in checks]


def _quantile(q: float) -> Callable[[FloatArray], Statistic]:
    return lambda values: stats.quantile(values, q)


def _check(
    name: str, metric: str, unit: str, measured: float, summary: Summary, spread: Interval | None, n: int, note: str
) -> Check:
    """One metric; `spread`: the interval of the measured value."""
    simulated = summary.metrics[metric]
    ends = (
        None
        if spread is None
        else (stats.relative_error(spread[1], simulated), stats.relative_error(spread[0], simulated))
    )
    return Check(
        run=name,
        level="e2e",
        metric=metric,
        unit=unit,
        measured=measured,
        simulated=simulated,
        error=stats.relative_error(measured, simulated),
        interval=ends,
        n=n,
        note=note,
    )


def _note(measured: Run, summary: Summary) -> str:
    note = NO_PAIRS
    num_requests = measured.requests.num_rows
    if summary.num_requests not in (None, num_requests):
        note += f" (of {summary.num_requests} requests, where the recording has {num_requests})"
    return note
