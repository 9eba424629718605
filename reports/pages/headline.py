"""The few numbers that a target is known by, and how they moved from report to report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from kvtwin.reports.numbers import MISSING, percent
from kvtwin.reports.words import is_magnitude
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.result import Check

METRICS: Final[Mapping[str, str]] = {
    "step_mape": "Step MAPE",
    "ttft_mean": "TTFT mean",
    "ttft_p90": "TTFT p90",
    "tpot_mean": "TPOT mean",
    "latency_mean": "Latency mean",
    "throughput": "Throughput",
}


@dataclass(frozen=True, slots=True)
class Headline:
    """One metric of one report, over all its recorded runs.

    Attributes:
        metric: a key of METRICS.
        checks: one per run; at least one has a finite error.
        size: mean |error| over the runs: what a trend follows.
    """

    metric: str
    checks: tuple[Check, ...]
    size: float

    @property
    def errors(self) -> list[float]:
        """The errors that could be computed."""
        return [check.error for check in self.checks if math.isfinite(check.error)]

    @property
    def shown(self) -> str:
        """The error, or its range over the runs."""
        signed = not is_magnitude(self.checks[0])
        return _range(self.errors, signed=signed)

    @property
    def worst(self) -> Check:
        """The check with the largest error."""
        return max(self.checks, key=lambda check: abs(check.error) if math.isfinite(check.error) else -1)

    @property
    def verdict(self) -> str:
        """The hardest verdict of the runs."""
        found = {check.verdict for check in self.checks}
        return next(verdict for verdict in ("fail", "pass", "not distinguishable", "no gate") if verdict in found)


def headlines(checks: Sequence[Check]) -> dict[str, Headline]:
    """The headline metrics that the checks hold, in the order of METRICS."""
    found = {}
    for metric in METRICS:
        same = tuple(check for check in checks if check.metric == metric)
        errors = [abs(check.error) for check in same if math.isfinite(check.error)]
        if errors:
            found[metric] = Headline(metric, same, fmean(errors))
    return found


def gates_held(checks: Sequence[Check]) -> tuple[int, int]:
    """(gates that hold, all gates)."""
    gated = [check for check in checks if check.threshold is not None]
    return sum(check.verdict != "fail" for check in gated), len(gated)


def limits(headline: Headline) -> str:
    """The gate and the noise floor beside a headline: the ranges over its runs."""
    parts = []
    for name, key in (("gate", "threshold"), ("noise floor", "noise_floor")):
        values = [value for check in headline.checks if (value := getattr(check, key)) is not None]
        if values:
            parts.append(f"{name} {_range(values, signed=False)}")
    return ", ".join(parts) or "no gate"


def _range(values: Sequence[float], *, signed: bool) -> str:
    low, high = (percent(end, signed=signed) for end in (min(values), max(values)))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def size_text(report: StoredReport, metric: str) -> str:
    """Mean |error| over the runs, as text."""
    found = headlines(report.checks).get(metric)
    return percent(found.size, signed=False) if found else MISSING
