"""What figures of distributions share: a curve, and a table of two sides' quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtwin.reports.aggregate.document import SHARES, Distribution, Pair
from kvtwin.reports.numbers import MISSING, number, percent
from kvtwin.reports.pages.markup import Table

_QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "largest": 1.0}


def cdf(name: str, found: Distribution, line: Mapping[str, Any], hover: str, scale: float = 1) -> dict[str, Any]:
    """The share of values up to each one; `hover` says how plotly writes a value, which is multiplied by `scale`."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [float(f"{scale * value:.5g}") for value in found.values],
        "y": list(SHARES),
        "line": {**line, "shape": "hv"},
        "hovertemplate": "%{y:.1%} within " + hover + "<extra>" + name + "</extra>",
    }


def pair_table(caption: str, pair: Pair) -> Table:
    """Quantiles of both sides and their relative difference."""
    rows = []
    if pair.measured and pair.simulated:
        sides = (pair.measured, pair.simulated)
        rows.append(_pair_row("mean", *(side.mean for side in sides)))
        rows += [_pair_row(name, *(side.quantile(q) for side in sides)) for name, q in _QUANTILES.items()]
    return Table(caption, ("statistic", "measured", "simulated", "difference"), rows)


def _pair_row(name: str, measured: float, simulated: float) -> tuple[str, ...]:
    difference = percent(simulated / measured - 1) if measured else MISSING
    return name, number(measured), number(simulated), difference
