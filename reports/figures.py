"""The figures of one Comparison, as plotly.js specifications (plain dicts) with their numbers in words.

Nothing here imports plotly: a specification is data, drawn by the plotly.js inside the page. Colours are
written `var(--name)` and resolved in the page, so that they follow the light or dark theme. No text from
outside (request ids, names) enters a specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.calibrate.stats import relative_errors
from kvtwin.reports import queue
from kvtwin.reports.numbers import count, number, percent
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS, NS_PER_S
from kvtwin.validate.e2e import request_metrics
from kvtwin.validate.result import Comparison

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MAX_PARITY_POINTS = 3000  # per figure; more would only be painted over each other
_MAX_CDF_POINTS = 300
_MAX_QUEUE_POINTS = 500
_LOG_AXIS_FROM_RATIO = 20  # p99 / p1 of a distribution from which a linear axis hides its lower part

_MINUS = "\N{MINUS SIGN}"

# Regimes in reading order: colour and marker differ, so that neither is needed to tell them apart.
_REGIMES = {"prefill": "circle", "decode": "diamond", "mixed": "square"}
_TIMES = {"ttft": "Time to first token", "tpot": "Time per output token"}
_MEASURED: Mapping[str, Any] = {"color": "var(--measured)", "width": 2.5}
_SIMULATED: Mapping[str, Any] = {"color": "var(--simulated)", "width": 2, "dash": "6px,3px"}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page.

    Attributes:
        key: names it within its run: "parity", "error_cdf", "ttft", "tpot", "queue".
        title: heading.
        text: what it shows, with its key numbers; stands for the figure where it cannot be seen.
        spec: `data` and `layout` for plotly.js; None when there is nothing to draw, and `text` says why.
        wide: takes the whole width of the page.
    """

    key: str
    title: str
    text: str
    spec: Mapping[str, Any] | None
    wide: bool = False


def figures(comparison: Comparison, max_parity_points: int = MAX_PARITY_POINTS) -> list[Figure]:
    """All figures of one comparison, in reading order."""
    runs = (comparison.measured, comparison.simulated)
    metrics = [request_metrics(run, comparison.clock) for run in runs]
    return [
        *_step_figures(comparison.predictions, max_parity_points),
        *(_latency_figure(key, title, *(times[f"{key}_ms"] for times in metrics)) for key, title in _TIMES.items()),
        _queue_figure(*runs),
    ]


def empirical_cdf(values: Floats, max_points: int = _MAX_CDF_POINTS) -> tuple[Floats, Floats]:
    """Sorted values and the share of all values that are no larger; evenly thinned, both ends kept.

    >>> x, y = empirical_cdf(np.array([3.0, 1.0, 2.0, 4.0]))
    >>> x.tolist(), y.tolist()
    ([1.0, 2.0, 3.0, 4.0], [0.25, 0.5, 0.75, 1.0])
    """
    kept = _evenly(values.size, max_points)
    return np.sort(values)[kept], (kept + 1) / max(values.size, 1)


# -- steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps that can be drawn: both times positive."""

    number: npt.NDArray[np.int64]
    measured_ms: Floats
    predicted_ms: Floats
    regime: npt.NDArray[np.str_]
    extrapolated: Bools

    def groups(self) -> list[tuple[str, Bools]]:
        """(regime, its rows) for the regimes present, the known ones first."""
        present = set(self.regime.tolist())
        names = [name for name in _REGIMES if name in present] + sorted(present - set(_REGIMES))
        return [(name, self.regime == name) for name in names]


def _step_figures(predictions: pa.Table | None, max_points: int) -> list[Figure]:
    parity, errors = "Step latency: measured and predicted", "Error of the predicted step latency"
    if predictions is None:
        why = "This recording has no steps, so step latency cannot be judged on it."
        return [Figure("parity", parity, why, None), Figure("error_cdf", errors, why, None)]
    steps = _drawable(predictions)
    if not steps.number.size:
        why = "No step has both a positive measured and a positive predicted time."
        return [Figure("parity", parity, why, None), Figure("error_cdf", errors, why, None)]
    return [_parity_figure(parity, steps, max_points), _error_figure(errors, steps)]


def _drawable(predictions: pa.Table) -> _Steps:
    """Unknown times are left out; a log axis and a relative error also need positive ones."""
    positive = pc.and_(pc.greater(predictions["measured_ns"], 0), pc.greater(predictions["predicted_ns"], 0))
    rows = predictions.filter(pc.fill_null(positive, False))
    regime = pc.fill_null(rows["regime"], "unknown").to_pylist()
    return _Steps(
        number=rows["step"].to_numpy(),
        measured_ms=rows["measured_ns"].to_numpy() / NS_PER_MS,
        predicted_ms=rows["predicted_ns"].to_numpy() / NS_PER_MS,
        # Only the known names are shown as they are: nothing else from a file may enter a figure.
        regime=np.array([name if name in _REGIMES else "other" for name in regime], dtype=np.str_),
        extrapolated=pc.fill_null(rows["extrapolated"], False).to_numpy().astype(np.bool_),
    )


def _parity_figure(title: str, steps: _Steps, max_points: int) -> Figure:
    groups = steps.groups()
    traces: list[dict[str, Any]] = []
    shown = 0
    # The rarest regime is thinned least and painted last, so that a few prefills do not drown in many decodes.
    for index, (name, rows) in enumerate(sorted(groups, key=lambda group: int(group[1].sum()))):
        allowed = (max_points - shown) // (len(groups) - index)
        kept = np.flatnonzero(rows)[_evenly(int(rows.sum()), allowed)]
        shown += kept.size
        parts = {outside: kept[steps.extrapolated[kept] == outside] for outside in (False, True)}
        for outside in (True, False):
            if parts[outside].size:
                named = not outside or not parts[False].size
                traces.insert(0, _parity_points(steps, parts[outside], name, outside, named))
    low, high = _log_range(np.concatenate([steps.measured_ms, steps.predicted_ms]))
    traces = [*_parity_lines(low, high), *traces]
    axis = {"type": "log", "range": [low, high], "minor": {"ticks": ""}, **_log_ticks(low, high)}
    layout = _layout(
        xaxis={**axis, "title": {"text": "measured, ms"}}, yaxis={**axis, "title": {"text": "predicted, ms"}}
    )
    return Figure("parity", title, _parity_text(steps, shown), {"data": traces, "layout": layout})


def _parity_points(steps: _Steps, rows: npt.NDArray[np.intp], name: str, outside: bool, named: bool) -> dict[str, Any]:
    symbol = _REGIMES.get(name, "cross")
    label = f"{name}, outside the fitted domain" if outside else name  # on hovering; the legend stays short
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "showlegend": named,
        "legendrank": 1001 + [*_REGIMES, "other"].index(name),  # in reading order, whatever is painted first
        "x": _rounded(steps.measured_ms[rows]),
        "y": _rounded(steps.predicted_ms[rows]),
        "text": steps.number[rows].tolist(),
        "hovertemplate": "step %{text}<br>measured %{x} ms<br>predicted %{y} ms<extra>" + label + "</extra>",
        "marker": {
            "symbol": f"{symbol}-open" if outside else symbol,
            "color": f"var(--{name})",
            "size": 6,
            "opacity": 0.6,
        },
    }


def _parity_lines(low: float, high: float) -> list[dict[str, Any]]:
    """Where predicted = measured, and 10 % to either side; in log10 of ms."""
    ends = np.array([10**low, 10**high])
    lines = []
    for factor, name, dash in ((1.0, "exact", "solid"), (1.1, "±10 %", "dot"), (1 / 1.1, f"{_MINUS}10 %", "dot")):
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": _rounded(ends, 6),
                "y": _rounded(ends * factor, 6),
                "line": {"color": "var(--muted)", "width": 1.25, "dash": dash},
                "hoverinfo": "skip",
                "showlegend": factor >= 1,
            }
        )
    return lines


def _parity_text(steps: _Steps, shown: int) -> str:
    error = relative_errors(steps.measured_ms, steps.predicted_ms)
    total = count(error.size, "step")
    text = f"{total}, all drawn." if shown == error.size else f"{total}, {shown:,} of them drawn."
    text += (
        f" Measured median {number(float(np.median(steps.measured_ms)))} ms, "
        f"predicted {number(float(np.median(steps.predicted_ms)))} ms; mean absolute error "
        f"{percent(float(np.mean(np.abs(error))), signed=False)}."
    )
    outside = int(steps.extrapolated.sum())
    return (
        f"{text} {count(outside, 'step')} (hollow) outside the domain that the profile was fitted on."
        if outside
        else text
    )


def _error_figure(title: str, steps: _Steps) -> Figure:
    error = 100 * relative_errors(steps.measured_ms, steps.predicted_ms)
    groups = steps.groups()
    curves = [(name, error[rows], f"var(--{name})") for name, rows in groups]
    if len(groups) > 1:
        curves.append(("all steps", error, "var(--ink)"))
    data = [_cdf_trace(name, values, {"color": colour, "width": 2}, "%{x:+.2f} %") for name, values, colour in curves]
    low, high = np.quantile(error, [0.005, 0.995])
    pad = max(0.06 * (high - low), 0.5)
    shapes = [_line_at_zero()]
    x_axis = {"title": {"text": f"predicted / measured {_MINUS} 1, %"}, "range": [float(low - pad), float(high + pad)]}
    layout = _layout(xaxis=x_axis, yaxis=_share_axis("share of steps"), shapes=shapes)
    return Figure("error_cdf", title, _error_text(curves), {"data": data, "layout": layout})


def _error_text(curves: Sequence[tuple[str, Floats, str]]) -> str:
    """Of all steps (the last curve) where 90 % of the errors lie; of each regime the median."""
    every = curves[-1][1]
    low, middle, high = (percent(float(q) / 100) for q in np.quantile(every, [0.05, 0.5, 0.95]))
    parts = [f"{name} {percent(float(np.median(values)) / 100)} ({values.size:,})" for name, values, _ in curves[:-1]]
    by_regime = f" Median by regime, with its number of steps: {', '.join(parts)}."
    return f"Median {middle}; 90 % of the steps between {low} and {high}.{by_regime if len(curves) > 1 else ''}"


# -- requests ---------------------------------------------------------------------------------------------


def _latency_figure(key: str, title: str, measured: Floats, simulated: Floats) -> Figure:
    """Each run's distribution of its own; requests whose time is unknown (NaN) are left out."""
    title = f"{title} ({key.upper()})"
    measured, simulated = (values[np.isfinite(values)] for values in (measured, simulated))
    if not (measured.size and simulated.size):
        empty = "recording" if not measured.size else "simulation"
        return Figure(key, title, f"The {empty} has no known {key.upper()}.", None)
    data = [
        _cdf_trace("measured", measured, _MEASURED, "%{x} ms"),
        _cdf_trace("simulated", simulated, _SIMULATED, "%{x} ms"),
    ]
    x_axis = {"title": {"text": f"{key.upper()}, ms"}, **_value_axis(np.concatenate([measured, simulated]))}
    layout = _layout(xaxis=x_axis, yaxis=_share_axis("share of requests"))
    return Figure(key, title, _latency_text(measured, simulated), {"data": data, "layout": layout})


def _latency_text(measured: Floats, simulated: Floats) -> str:
    names = ("median", "90th percentile", "99th percentile")
    pairs = zip(names, *(np.quantile(side, [0.5, 0.9, 0.99]) for side in (measured, simulated)), strict=True)
    parts = [f"{name} {number(float(real))} and {number(float(twin))} ms" for name, real, twin in pairs]
    same = measured.size == simulated.size
    who = count(measured.size, "request") if same else f"{measured.size:,} and {simulated.size:,} requests"
    return f"Measured and simulated, {who}: {'; '.join(parts)}."


def _value_axis(values: Floats) -> dict[str, Any]:
    """Logarithmic where the values span a wide range; else linear from zero."""
    low, high = np.quantile(values, [0.01, 0.99])
    if values.min() > 0 and high / low >= _LOG_AXIS_FROM_RATIO:
        ends = _log_range(values)
        return {"type": "log", "range": list(ends), **_log_ticks(*ends)}
    return {"rangemode": "tozero"}


# -- queue ------------------------------------------------------------------------------------------------


def _queue_figure(measured: Run, simulated: Run) -> Figure:
    title = "Queue length over time"
    source = queue.common_source(measured, simulated)
    if source is None:
        why = "Unknown: one of the two runs has neither queue lengths nor scheduling times."
        return Figure("queue", title, why, None, wide=True)
    lengths = [queue.queue_lengths(run, source) for run in (measured, simulated)]
    starts = [_start_ns(run) for run in (measured, simulated)]
    data: list[dict[str, Any]] = []
    for side, start, name, line in zip(
        lengths, starts, ("measured", "simulated"), (_MEASURED, _SIMULATED), strict=True
    ):
        # The measured curve is an area and the simulated one a line: dashes would fray on so many corners.
        fill = {"fill": "tozeroy", "fillcolor": "var(--measured-fill)"} if name == "measured" else {}
        data.append({**_queue_trace(side.running, start, name, line, row=""), **fill})
        data.append({**_queue_trace(side.waiting, start, name, line, row="2"), **fill, "showlegend": False})
    layout = _layout(
        xaxis={"title": {"text": "seconds since the first arrival"}, "anchor": "y2"},
        yaxis={"title": {"text": "running"}, "domain": [0.54, 1], "rangemode": "tozero"},
        yaxis2={"title": {"text": "waiting"}, "domain": [0, 0.46], "rangemode": "tozero", **_grid()},
    )
    text = _queue_text(source, *lengths)
    if any(curve.times_ns.size > _MAX_QUEUE_POINTS for side in lengths for curve in (side.waiting, side.running)):
        text += f" Drawn as means over {_MAX_QUEUE_POINTS} equal intervals, so short peaks look lower than they are."
    return Figure("queue", title, text, {"data": data, "layout": layout}, wide=True)


def _start_ns(run: Run) -> int:
    return run.requests["arrival_ns"][0].as_py() if run.requests.num_rows else 0


def _queue_trace(curve: queue.Curve, start: int, name: str, line: Mapping[str, Any], row: str) -> dict[str, Any]:
    times, values = queue.sampled(curve, _MAX_QUEUE_POINTS)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _rounded((times - start) / NS_PER_S, 6),
        "y": _rounded(values),
        "yaxis": f"y{row}",
        "line": {**line, "shape": "hv", "width": 1.5, "dash": "solid"},
        "hovertemplate": "%{x} s: %{y}<extra>" + name + "</extra>",
    }


def _queue_text(source: queue.Source, measured: queue.QueueLengths, simulated: queue.QueueLengths) -> str:
    origin = {
        "steps": "as the scheduler counted them after each schedule()",
        "queued_ns": "waiting from the engine's input queue to the first schedule",
        "arrival_ns": "waiting from the client's arrival to the first schedule",
    }[source]
    parts = []
    for name in ("running", "waiting"):
        real, twin = getattr(measured, name), getattr(simulated, name)
        parts.append(
            f"{name}: mean {number(real.mean())} measured and {number(twin.mean())} simulated, "
            f"peak {real.peak()} and {twin.peak()}"
        )
    return f"Requests in the engine, {origin}. {'; '.join(parts).capitalize()}."


# -- shared parts -----------------------------------------------------------------------------------------


def _cdf_trace(name: str, values: Floats, line: Mapping[str, Any], hover: str) -> dict[str, Any]:
    x, y = empirical_cdf(values)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _rounded(x),
        "y": _rounded(y),
        "line": {**line, "shape": "hv"},
        "hovertemplate": "%{y:.1%} within " + hover + "<extra>" + name + "</extra>",
    }


def _evenly(size: int, max_points: int) -> npt.NDArray[np.intp]:
    """At most `max_points` indices below `size`, evenly spread, first and last included: no dice."""
    if size <= max_points:
        return np.arange(size)
    return np.round(np.linspace(0, size - 1, max_points)).astype(np.intp)


def _rounded(values: Floats, digits: int = 4) -> list[float]:
    """Significant digits that a screen can show; the page stays small, and has no NaN."""
    return [float(f"{value:.{digits}g}") for value in values.tolist() if math.isfinite(value)]


def _log_range(values: Floats) -> tuple[float, float]:
    """log10 of the smallest and largest value, with a little room; a range even for equal values."""
    low, high = math.log10(values.min()), math.log10(values.max())
    pad = max(0.04 * (high - low), 0.05)
    return round(low - pad, 4), round(high + pad, 4)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """1, 2, 5 within two decades; whole decades beyond, where more labels would touch."""
    return (
        {"dtick": "D2"} if high - low < 0.5 else {"tickvals": _ladder(low, high, (1, 2, 5) if high - low < 3 else (1,))}
    )


def _ladder(low: float, high: float, steps: Sequence[int]) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [float(f"{value:.1g}") for value in values if low <= math.log10(value) <= high]


def _share_axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "range": [0, 1.02], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}


def _line_at_zero() -> dict[str, Any]:
    line = {"color": "var(--muted)", "width": 1.25}
    return {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": line, "layer": "below"}


def _grid() -> dict[str, Any]:
    return {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "separatethousands": True,
    }


def _layout(xaxis: Mapping[str, Any], yaxis: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "xaxis": {**_grid(), "showline": True, **xaxis},
        "yaxis": {**_grid(), **yaxis},
        "margin": {"l": 60, "r": 16, "t": 44, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink-soft)", "size": 12.5},
        "hoverlabel": {"bgcolor": "var(--panel)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        **more,
    }
