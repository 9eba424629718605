"""The figures of one recorded run, drawn from figures.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kvtwin.reports.aggregate.document import (
    SHARES,
    CacheHits,
    Distribution,
    Envelope,
    ErrorMap,
    Pair,
    ParityCells,
    RunFigures,
    StepFigures,
    Timeline,
)
from kvtwin.reports.numbers import MISSING, count, number, percent
from kvtwin.reports.pages.markup import Table
from kvtwin.reports.pages.plots import MEASURED, MINUS, SIMULATED, Figure, grid, layout, line_at, log_axis, share_axis

# Regimes in reading order: colour and marker differ, so that neither is needed to tell them apart.
_REGIMES = {"prefill": "circle", "decode": "diamond", "mixed": "square", "other": "cross"}
_LATENCIES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "latency": "End-to-end latency",
}
_LOG_AXIS_FROM_RATIO = 6  # p99 / p1 of a distribution from which a linear axis hides its lower part
_COUNTS = {"running": "running", "waiting": "waiting", "kv_blocks": "KV blocks"}
_QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "largest": 1.0}


def figures_of_run(run: RunFigures) -> list[Figure]:
    """All figures in reading order."""
    return [
        *_step_figures(run.steps),
        *(_latency_figure(key, title, run.latencies.get(key)) for key, title in _LATENCIES.items()),
        _timeline_figure(run.timeline),
        _cache_figure(*run.cache),
    ]


# -- steps ------------------------------------------------------------------------------------------------


def _step_figures(steps: StepFigures | None) -> list[Figure]:
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
    return Figure("parity", title, _parity_text(steps), spec, _pair_table("Step latency, ms", steps.times))


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
        _cdf(name, found, {"color": f"var(--{name})", "width": 2}, "%{x:+.2f} %", 100) for name, found in curves.items()
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


# -- requests ---------------------------------------------------------------------------------------------


def _latency_figure(key: str, title: str, pair: Pair | None) -> Figure:
    """Each run's distribution of its own; requests whose time is unknown are left out."""
    short = "latency" if key == "latency" else key.upper()
    unit = "token gap" if key == "itl" else "request"
    if pair is None or pair.measured is None or pair.simulated is None:
        empty = "recording" if pair is None or pair.measured is None else "simulation"
        needs = " It would come from recorded steps." if key == "itl" else ""
        return Figure(key, title, f"The {empty} has no known {short}.{needs}", None, columns=3)
    measured, simulated = pair.measured, pair.simulated
    data = [_cdf("measured", measured, MEASURED, "%{x} ms"), _cdf("simulated", simulated, SIMULATED, "%{x} ms")]
    x_axis = {"title": {"text": f"{short}, ms"}, **_value_axis(measured, simulated)}
    spec = {"data": data, "layout": layout(x_axis, share_axis(f"share of {unit}s"))}
    middle, tail = (
        f"{name} {number(measured.quantile(q))} and {number(simulated.quantile(q))} ms"
        for name, q in (("median", 0.5), ("p99", 0.99))
    )
    same = measured.n == simulated.n
    who = count(measured.n, unit) if same else f"{measured.n:,} and {count(simulated.n, unit)}"
    text = f"Measured and simulated, {who}: {middle}; {tail}."
    return Figure(key, title, text, spec, _pair_table(f"{short}, ms", pair), columns=3)


def _value_axis(*sides: Distribution) -> dict[str, Any]:
    """Logarithmic where the values span a wide range; else linear from zero."""
    low, high = min(side.values[0] for side in sides), max(side.values[-1] for side in sides)
    if low > 0 and any(side.quantile(0.99) / side.quantile(0.01) >= _LOG_AXIS_FROM_RATIO for side in sides):
        return log_axis(low, high)
    # A few stragglers would squeeze all others into a corner: beyond, one zooms out.
    return {"range": [0, float(f"{1.08 * max(side.quantile(0.995) for side in sides):.4g}") or 1]}


def _pair_table(caption: str, pair: Pair) -> Table:
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


def _cdf(name: str, found: Distribution, line: Mapping[str, Any], hover: str, scale: float = 1) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [float(f"{scale * value:.5g}") for value in found.values],
        "y": list(SHARES),
        "line": {**line, "shape": "hv"},
        "hovertemplate": "%{y:.1%} within " + hover + "<extra>" + name + "</extra>",
    }


# -- over time --------------------------------------------------------------------------------------------


def _timeline_figure(timeline: Timeline | None) -> Figure:
    title = "Queues and KV cache over time"
    if timeline is None:
        why = "Unknown: one of the two runs has neither queue lengths nor scheduling times."
        return Figure("timeline", title, why, None, columns=12)
    names = [name for name in _COUNTS if name in timeline.counts]
    data: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    height = 1 / len(names)
    for index, name in enumerate(names):
        row = "" if index == 0 else str(index + 1)
        top = 1 - index * height
        domain = [round(max(top - height + (0.06 if index + 1 < len(names) else 0), 0), 4), round(top, 4)]
        axes[f"yaxis{row}"] = {**grid(), "title": {"text": _COUNTS[name]}, "domain": domain, "rangemode": "tozero"}
        pair = timeline.counts[name]
        if pair.measured:
            data += _envelope_traces("measured", pair.measured, timeline.interval_s, row, legend=index == 0)
        if pair.simulated:
            data += _envelope_traces("simulated", pair.simulated, timeline.interval_s, row, legend=index == 0)
    x_axis = {**grid(), "showline": True, "title": {"text": "seconds since the first arrival"}}
    x_axis["anchor"] = "y" if len(names) == 1 else f"y{len(names)}"
    spec = {"data": data, "layout": layout(x_axis, axes.pop("yaxis"), **axes, hovermode="x unified")}
    rows = [_count_row(name, timeline.counts[name].measured, timeline.counts[name].simulated) for name in names]
    heads = ("count", "mean measured", "mean simulated", "peak measured", "peak simulated")
    return Figure(
        "timeline", title, _timeline_text(timeline, rows), spec, Table("Mean and peak", heads, rows), columns=12
    )


def _envelope_traces(name: str, side: Envelope, interval_s: float, row: str, *, legend: bool) -> list[dict[str, Any]]:
    """The mean as a line over a band from the smallest to the largest value."""
    shared = {"type": "scatter", "mode": "lines", "x0": 0, "dx": interval_s, "yaxis": f"y{row}", "legendgroup": name}
    line = MEASURED if name == "measured" else SIMULATED
    edge = {**shared, "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip", "showlegend": False}
    span = [
        f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in zip(side.low, side.high, strict=True)
    ]
    return [
        {**edge, "y": side.low},
        {**edge, "y": side.high, "fill": "tonexty", "fillcolor": f"var(--{name}-fill)"},
        {
            **shared,
            "name": name,
            "y": side.mean,
            "text": span,
            "line": {**line, "width": 1.5, "shape": "hv"},
            "hovertemplate": "%{y} (%{text})",
            "showlegend": legend,
        },
    ]


def _count_row(name: str, measured: Envelope | None, simulated: Envelope | None) -> tuple[str, ...]:
    sides = (measured, simulated)
    means = (number(side.average) if side else MISSING for side in sides)
    peaks = (f"{side.peak:,}" if side else MISSING for side in sides)
    return (_COUNTS[name], *means, *peaks)


def _timeline_text(timeline: Timeline, rows: Sequence[Sequence[str]]) -> str:
    origin = {
        "steps": "as the scheduler counted them after each schedule()",
        "queued_ns": "waiting from the engine's input queue to the first schedule",
    }.get(timeline.source, "waiting from the client's arrival to the first schedule")
    means = "; ".join(f"{name} {real} and {twin}" for name, real, twin, *_ in rows)
    text = f"Mean measured and simulated, {origin}: {means}. Lines are means over {number(timeline.interval_s)} s, "
    text += "bands reach from the smallest to the largest value in it."
    if "kv_blocks" in timeline.counts:
        text += " Blocks in use: the most ever seen free, less those free now."
    return text


# -- cache ------------------------------------------------------------------------------------------------


def _cache_figure(measured: CacheHits | None, simulated: CacheHits | None) -> Figure:
    """Hit tokens per level; a level that a run does not know is left out of it."""
    title = "Prefix-cache hits by level"
    if measured is None and simulated is None:
        return Figure("cache", title, "Neither run knows its prefix-cache hits (cached_tokens).", None, columns=4)
    sides = [(name, found) for name, found in (("measured", measured), ("simulated", simulated)) if found]
    levels = {name: _levels(found) for name, found in sides}
    names = [level for level in ("HBM", "host DRAM", "storage") if any(level in found for found in levels.values())]
    rows = [
        (
            level,
            *(_tokens(levels[side].get(level)) if side in levels else MISSING for side in ("measured", "simulated")),
        )
        for level in names
    ]
    shares = [f"{name} {percent(found.hit_tokens / max(found.input_tokens, 1), signed=False)}" for name, found in sides]
    unknown = "" if len(sides) == 2 else f" The {'simulation' if measured else 'recording'} does not know its hits."
    text = f"Share of prompt tokens found in a cache: {' and '.join(shares)}.{unknown}"
    table = Table("Hit tokens by level", ("level", "measured", "simulated"), rows)
    if not any(found.hit_tokens for _, found in sides):
        return Figure("cache", title, f"No prompt token was found in a cache.{unknown}", None, table, columns=4)
    data = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [levels[name].get(level) for level in names],
            "marker": {"color": f"var(--{name})"},
            "hovertemplate": "%{y:,} tokens from %{x}<extra>" + name + "</extra>",
        }
        for name, _ in sides
    ]
    spec = {
        "data": data,
        "layout": layout({"type": "category"}, {"title": {"text": "hit tokens"}}, barmode="group", bargap=0.55),
    }
    return Figure("cache", title, text, spec, table, columns=4)


def _levels(hits: CacheHits) -> dict[str, int]:
    """Hit tokens of each level that the run knows; what came from no lower level was in HBM."""
    lower = {"host DRAM": hits.host_tokens, "storage": hits.storage_tokens}
    known = {level: tokens for level, tokens in lower.items() if tokens is not None}
    return {"HBM": hits.hit_tokens - sum(known.values()), **known}


def _tokens(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"
