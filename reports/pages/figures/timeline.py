"""Queue lengths and KV blocks in use, over the time of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtwin.reports.aggregate.document import Envelope, Timeline
from kvtwin.reports.numbers import MISSING, number
from kvtwin.reports.pages.markup import Table
from kvtwin.reports.pages.plots import MEASURED, SIMULATED, Figure, grid, layout

_COUNTS = {"running": "running", "waiting": "waiting", "kv_blocks": "KV blocks"}


def timeline_figure(timeline: Timeline | None) -> Figure:
    """A row of mean and range per count, measured and simulated."""
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
