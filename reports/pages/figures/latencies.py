"""Latencies of the requests: the distributions of a recording and of a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtwin.reports.aggregate.document import Distribution, Pair
from kvtwin.reports.numbers import count, number
from kvtwin.reports.pages.figures.distributions import cdf, pair_table
from kvtwin.reports.pages.plots import MEASURED, SIMULATED, Figure, layout, log_axis, share_axis

_LATENCIES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "latency": "End-to-end latency",
}
_LOG_AXIS_FROM_RATIO = 6  # p99 / p1 of a distribution from which a linear axis hides its lower part


def latency_figures(latencies: Mapping[str, Pair]) -> list[Figure]:
    """One per kind of latency, whether the runs know it or not."""
    return [_latency_figure(key, title, latencies.get(key)) for key, title in _LATENCIES.items()]


def _latency_figure(key: str, title: str, pair: Pair | None) -> Figure:
    """Each run's distribution of its own; requests whose time is unknown are left out."""
    short = "latency" if key == "latency" else key.upper()
    unit = "token gap" if key == "itl" else "request"
    if pair is None or pair.measured is None or pair.simulated is None:
        empty = "recording" if pair is None or pair.measured is None else "simulation"
        needs = " It would come from recorded steps." if key == "itl" else ""
        return Figure(key, title, f"The {empty} has no known {short}.{needs}", None, columns=3)
    measured, simulated = pair.measured, pair.simulated
    data = [cdf("measured", measured, MEASURED, "%{x} ms"), cdf("simulated", simulated, SIMULATED, "%{x} ms")]
    x_axis = {"title": {"text": f"{short}, ms"}, **_value_axis(measured, simulated)}
    spec = {"data": data, "layout": layout(x_axis, share_axis(f"share of {unit}s"))}
    middle, tail = (
        f"{name} {number(measured.quantile(q))} and {number(simulated.quantile(q))} ms"
        for name, q in (("median", 0.5), ("p99", 0.99))
    )
    same = measured.n == simulated.n
    who = count(measured.n, unit) if same else f"{measured.n:,} and {count(simulated.n, unit)}"
    text = f"Measured and simulated, {who}: {middle}; {tail}."
    return Figure(key, title, text, spec, pair_table(f"{short}, ms", pair), columns=3)


def _value_axis(*sides: Distribution) -> dict[str, Any]:
    """Logarithmic where the values span a wide range; else linear from zero."""
    low, high = min(side.values[0] for side in sides), max(side.values[-1] for side in sides)
    if low > 0 and any(side.quantile(0.99) / side.quantile(0.01) >= _LOG_AXIS_FROM_RATIO for side in sides):
        return log_axis(low, high)
    # A few stragglers would squeeze all others into a corner: beyond, one zooms out.
    return {"range": [0, float(f"{1.08 * max(side.quantile(0.995) for side in sides):.4g}") or 1]}
