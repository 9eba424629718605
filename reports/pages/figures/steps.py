"""Step latency: measured against predicted, the error over batch sizes, and its distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kvtwin.reports.aggregate.document import Distribution, ErrorMap, ParityCells, StepFigures
from kvtwin.reports.numbers import count, number, percent
from kvtwin.reports.pages.figures.distributions import cdf, pair_table
from kvtwin.reports.pages.markup import Table
from kvtwin.reports.pages.plots import MINUS, Figure, layout, line_at, log_axis, share_axis

# Regimes in reading order: colour and marker differ, so that neither is needed to tell them apart.
_REGIMES = {"prefill": "circle", "decode": "diamond", "mixed": "square", "other": "cross"}


def step_figures(steps: StepFigures | None) -> list[Figure]:
    """Parity, the error by batch size, and its distribution; without steps, why there are none."""
    titles = {
        "parity": "Step latency, measured and predicted",
        "error_map": "Step error by batch size",
        "error_cdf": "Step error by regime",
    }
    if steps is None:
        why = "This recording has no steps with a measured and a predicted time: step latency cannot be judged on it."
        return [Figure(key, title, why, None) for key, title in titles.items()]
    return [
        _parity_figure(titles["parity"], steps),
        _map_figure(titles["error_map"], steps.error_map),
        _error_figure(titles["error_cdf"], steps.errors),
    ]


def _parity_figure(title: str, steps: StepFigures) -> Figure:
    times = [value for part in steps.parity for value in (*part.measured_ms, *part.predicted_ms)]
    axis = log_axis(min(times), max(times))
    # The rarest kind is painted last, so that a few prefills do not drown in many decodes.
    parts = sorted(steps.parity, key=lambda part: -sum(part.num_steps))
    shown: set[str] = set()
    points = []
    for part in parts:
        points.append(_parity_points(part, named=part.regime not in shown))
        shown.add(part.regime)
    low, high = (10**end for end in axis["range"])
    spec = {
        "data": [*_parity_lines(low, high), *points],
        "layout": layout(
            xaxis={**axis, "title": {"text": "measured, ms"}}, yaxis={**axis, "title": {"text": "predicted, ms"}}
        ),
    }
    return Figure("parity", title, _parity_text(steps), spec, pair_table("Step latency, ms", steps.times))


def _parity_points(part: ParityCells, *, named: bool) -> dict[str, Any]:
    """A mark per cell, larger where it stands for more steps."""
    where = ", outside the fitted domain" if part.extrapolated else ""
    symbol = _REGIMES.get(part.regime, "cross")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": part.regime if part.regime in _REGIMES else "other",
        "legendgroup": part.regime,
        "showlegend": named,
        "legendrank": 1001 + [*_REGIMES].index(part.regime) if part.regime in _REGIMES else 1010,
        "x": part.measured_ms,
        "y": part.predicted_ms,
        "text": part.num_steps,
        "customdata": part.step,
        "hovertemplate": "%{text:,} steps, the first is step %{customdata}<br>measured %{x} ms<br>predicted %{y} ms<extra>"
        + part.regime
        + where
        + "</extra>",
        "marker": {
            "symbol": f"{symbol}-open" if part.extrapolated else symbol,
            "color": f"var(--{part.regime})",
            "size": [round(4.5 + 2.2 * math.log10(steps), 1) for steps in part.num_steps],
            "opacity": _opacities(part.num_steps),
            "line": {"width": 0},
        },
    }


def _opacities(num_steps: Sequence[int]) -> list[float] | float:
    """Fainter where fewer steps stand behind a mark, so that a dense cloud shows its core."""
    most = max(num_steps)
    return 0.62 if most == 1 else [round(0.38 + 0.5 * math.log(steps) / math.log(most), 2) for steps in num_steps]


def _parity_lines(low: float, high: float) -> list[dict[str, Any]]:
    """Where predicted = measured, and 10 % to either side."""
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [low, high],
            "y": [low * factor, high * factor],
            "line": {"color": "var(--muted)", "width": 1.25, "dash": dash},
            "hoverinfo": "skip",
            "showlegend": factor >= 1,
        }
        for factor, name, dash in ((1.0, "exact", "solid"), (1.1, "±10 %", "dot"), (1 / 1.1, f"{MINUS}10 %", "dot"))
    ]


def _parity_text(steps: StepFigures) -> str:
    total = sum(sum(part.num_steps) for part in steps.parity)
    cells = sum(len(part.num_steps) for part in steps.parity)
    text = f"{count(total, 'step')}; "
    text += "each is a mark. " if cells == total else f"larger marks stand for more of them ({cells:,} marks). "
    if steps.times.measured and steps.times.simulated:
        middle = (number(side.quantile(0.5)) for side in (steps.times.measured, steps.times.simulated))
        text += "Median {} ms measured, {} ms predicted.".format(*middle)
    if steps.num_extrapolated:
        text += f" Hollow: {steps.num_extrapolated:,} outside the domain that the profile was fitted on."
    if steps.num_left_out:
        text += f" {steps.num_left_out:,} without a positive time left out."
    return text


def _map_figure(title: str, cells: ErrorMap) -> Figure:
    """Mean signed error over (cache_len, input_len), both summed over the batch."""
    across, up = (_bin_names(edges) for edges in (cells.cache_edges, cells.input_edges))
    errors: list[list[float | None]] = [[None] * len(across) for _ in up]
    hover = [[""] * len(across) for _ in up]
    rows = []
    for column, row, steps, error, mape in zip(
        cells.cache_bin, cells.input_bin, cells.num_steps, cells.mean_error, cells.mape, strict=True
    ):
        errors[row][column] = 100 * error
        numbers = (percent(error), percent(mape, signed=False), count(steps, "step"))
        hover[row][column] = "mean {}<br>mean absolute {}<br>{}".format(*numbers)
        rows.append((across[column], up[row], f"{steps:,}", *numbers[:2]))
    bound = max(5.0, min(50.0, 100 * _weighted_quantile(cells.mape, cells.num_steps, 0.95)))
    spec = {
        "data": [
            {
                "type": "heatmap",
                "x": across,
                "y": up,
                "z": errors,
                "text": hover,
                "hovertemplate": "cache_len %{x}, input_len %{y}<br>%{text}<extra></extra>",
                "hoverongaps": False,
                "zmin": -bound,
                "zmax": bound,
                "colorscale": [[0, "var(--too-fast)"], [0.5, "var(--even)"], [1, "var(--too-slow)"]],
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"thickness": 9, "ticksuffix": " %", "outlinewidth": 0, "len": 1.04},
            }
        ],
        "layout": layout(
            xaxis={
                "title": {"text": "cache_len, tokens, summed over the batch"},
                **_bin_axis(across, cells.cache_edges),
            },
            yaxis={"title": {"text": "input_len, new tokens"}, **_bin_axis(up, cells.input_edges)},
        ),
    }
    worst = max(range(len(rows)), key=lambda row: cells.mape[row] * cells.num_steps[row])
    text = (
        f"Mean signed error; red is predicted too slow, blue too fast, colours end at ±{bound:.0f} %. Most of the error "
        f"comes from {rows[worst][1]} new tokens over {rows[worst][0]} cached: mean absolute {rows[worst][4]} "
        f"over {count(cells.num_steps[worst], 'step')}."
    )
    heads = ("cache_len", "input_len", "steps", "mean error", "mean absolute error")
    return Figure("error_map", title, text, spec, Table("Step error by batch size", heads, rows))


def _bin_names(edges: Sequence[int]) -> list[str]:
    return [f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)]


def _bin_axis(names: Sequence[str], edges: Sequence[int]) -> dict[str, Any]:
    """A category per bin; every few of them named by where it begins, so that the names do not touch."""
    shown = range(0, len(names), -(-len(names) // 7))
    begins = [f"{edges[at]:,}" if edges[at] < 10_000 else f"{edges[at] / 1000:.0f}k" for at in shown]
    ticks = {"tickvals": [names[at] for at in shown], "ticktext": begins, "tickangle": 0}
    return {"type": "category", "categoryarray": list(names), **ticks}


def _weighted_quantile(values: Sequence[float], weights: Sequence[int], share: float) -> float:
    """The smallest value with at least `share` of the weight at or below it."""
    enough, below = share * sum(weights), 0
    for value, weight in sorted(zip(values, weights, strict=True)):
        below += weight
        if below >= enough:
            return value
    return 0.0


def _error_figure(title: str, errors: Mapping[str, Distribution]) -> Figure:
    every = errors["all"]
    regimes = {name: errors[name] for name in _REGIMES if name in errors}
    curves = {**regimes, "all": every} if len(regimes) > 1 else regimes
    data = [
        cdf(name, found, {"color": f"var(--{name})", "width": 2}, "%{x:+.2f} %", 100) for name, found in curves.items()
    ]
    low, high = 100 * every.quantile(0.005), 100 * every.quantile(0.995)
    pad = max(0.06 * (high - low), 0.5)
    x_axis = {"title": {"text": f"predicted / measured {MINUS} 1, %"}, "range": [low - pad, high + pad]}
    spec = {"data": data, "layout": layout(x_axis, share_axis("share of steps"), shapes=[line_at(0)])}
    middle, *ends = (percent(every.quantile(share)) for share in (0.5, 0.05, 0.95))
    text = f"Median {middle}; 90 % of the steps between {ends[0]} and {ends[1]}."
    rows = [
        (name, f"{found.n:,}", percent(found.mean), *(percent(found.quantile(q)) for q in (0.05, 0.5, 0.95)))
        for name, found in curves.items()
    ]
    table = Table("Step error by regime", ("regime", "steps", "mean", "p5", "p50", "p95"), rows)
    return Figure("error_cdf", title, text, spec, table)
