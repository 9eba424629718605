"""How a target's headline errors moved from report to report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtwin.reports.numbers import MISSING, percent
from kvtwin.reports.pages.headline import METRICS, gates_held, headlines, size_text
from kvtwin.reports.pages.markup import MARKS, Table, text
from kvtwin.reports.pages.plots import Figure, layout
from kvtwin.reports.words import verdict_word
from kvtwin.traces.time import iso_day
from kvtwin.validate.checks_json import StoredReport

_COLOURS = ("all", "measured", "simulated", "prefill", "decode", "mixed")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_SPARK = (96, 22)  # width and height


def date_of(report: StoredReport) -> str:
    """The day and minute of a report, or that it is unknown."""
    return "unknown date" if report.created is None else f"{report.created[:10]} {report.created[11:16]}"


def recorded_on(report: StoredReport) -> str | None:
    """The day of the oldest recording; None where it is unknown."""
    return iso_day(report.target.get("recorded", ""))


def dated(iso: str, shown: str, hover: str = "") -> str:
    """A date; the script adds how long ago it is."""
    title = f' title="{text(hover)}"' if hover else ""
    return f'<time datetime="{text(iso)}"{title}>{text(shown)}</time>'


def trend_figure(history: Sequence[StoredReport]) -> Figure:
    """Mean |error| over the runs of each report, oldest first."""
    title = "Trend over reports"
    rows = [_row(report) for report in history]
    table = Table(
        "Mean absolute error over the runs of each report",
        ("checked", "verdict", "gates held", "engine", "kvtwin", *METRICS.values()),
        rows,
    )
    if len(history) < 2:
        text = "One report so far. Give kvtwin report the outputs of older checks too: those of one target are its history."
        return Figure("trend", title, text, None, table, columns=12)
    dates = [report.created or f"report {index + 1}" for index, report in enumerate(history)]
    sizes = [headlines(report.checks) for report in history]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": dates,
            "y": [100 * found[metric].size if metric in found else None for found in sizes],
            "line": {"color": f"var(--{colour})", "width": 1.75},
            "marker": {"symbol": symbol, "size": 7},
            "hovertemplate": "%{x}: %{y:.2f} %<extra>" + name + "</extra>",
        }
        for (metric, name), colour, symbol in zip(METRICS.items(), _COLOURS, _SYMBOLS, strict=True)
        if any(metric in found for found in sizes)
    ]
    kind = "date" if all(report.created for report in history) else "category"
    y_axis = {"title": {"text": "mean |error|"}, "ticksuffix": " %", "rangemode": "tozero"}
    spec: dict[str, Any] = {"data": data, "layout": layout({"type": kind}, y_axis)}
    first, last = (size_text(report, "step_mape") for report in (history[0], history[-1]))
    steps = "" if MISSING in (first, last) else f" Step MAPE {first} in the oldest, {last} in the newest."
    text = f"{len(history)} reports from {date_of(history[0])} to {date_of(history[-1])}.{steps}"
    return Figure("trend", title, text, spec, table, columns=12)


def _row(report: StoredReport) -> tuple[str, ...]:
    held, gates = gates_held(report.checks)
    verdict = verdict_word(report)
    kvtwin = str(report.provenance.get("kvtwin", MISSING))
    facts = (date_of(report), f"{MARKS[verdict]} {verdict}", f"{held} of {gates}", report.target.get("engine", MISSING))
    return (*facts, kvtwin, *(size_text(report, metric) for metric in METRICS))


def sparkline(history: Sequence[StoredReport]) -> str:
    """A small picture of the step MAPE (where unknown, of the mean TTFT's error) over the reports, with its text."""
    sizes = [headlines(report.checks) for report in history]
    metric = next((name for name in METRICS if all(name in found for found in sizes)), None)
    if metric is None or len(history) < 2:
        return '<span class="soft">one report</span>' if metric else "&ndash;"
    values = [found[metric].size for found in sizes]
    width, height = _SPARK
    top = max(values) or 1.0
    points = [
        (4 + index * (width - 8) / (len(values) - 1), height - 3 - value / top * (height - 7))
        for index, value in enumerate(values)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    words = f"{METRICS[metric]}: {', '.join(percent(value, signed=False) for value in values)}"
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{text(words)}"><title>{text(words)}'
        f'</title><polyline points="{path}"/><circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5"/></svg>'
    )
