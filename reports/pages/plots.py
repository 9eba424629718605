"""Parts of plotly.js specifications: plain dicts. Nothing here imports plotly.

Colours are written `var(--name)` and resolved in the page, so that they follow the light or dark theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtwin.reports.pages.markup import Table, folded_table, text, typeset

MINUS = "\N{MINUS SIGN}"
MEASURED: Mapping[str, Any] = {"color": "var(--measured)", "width": 2.25}
SIMULATED: Mapping[str, Any] = {"color": "var(--simulated)", "width": 1.75, "dash": "6px,3px"}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a page.

    Attributes:
        key: names it within its section: "parity", "ttft", "timeline" ...
        title: heading.
        text: what it shows, with its key numbers.
        spec: `data` and `layout` for plotly.js; None when there is nothing to draw, and `text` says why.
        table: the numbers, for those who cannot see the figure or want them.
        columns: how many of the 12 columns of the grid it takes.
        notes: remarks to read with it.
    """

    key: str
    title: str
    text: str
    spec: Mapping[str, Any] | None
    table: Table | None = None
    columns: int = 4
    notes: Sequence[str] = ()


def figure_html(prefix: str, figure: Figure, level: int = 4) -> str:
    """The figure's place in the page; `level` is that of its heading."""
    key = f"figure-{prefix}-{figure.key}"
    plot = ""
    if figure.spec is not None:
        plot = f'<div class="plot" id="{key}" role="img" aria-label="{text(f"{figure.title}. {figure.text}")}"></div>'
    numbers = folded_table(figure.table) if figure.table else ""
    notes = "".join(f"<li>{typeset(note)}</li>" for note in figure.notes)
    remarks = f'<ul class="notes">{notes}</ul>' if notes else ""
    empty = " empty" if figure.spec is None else ""
    return f"""<figure class="panel c{figure.columns}{empty}"><figcaption><h{level}>{text(figure.title)}</h{level}>
<p>{typeset(figure.text)}</p></figcaption>{plot}{remarks}{numbers}</figure>
"""


def specs_of(prefix: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """The specifications by the id of the element they are drawn in."""
    return {f"figure-{prefix}-{figure.key}": figure.spec for figure in figures if figure.spec is not None}


def plotly_text(value: str, max_chars: int = 40) -> str:
    """A text from outside for a label: plotly reads a little markup there, so it is escaped, and cut."""
    short = value if len(value) <= max_chars else f"{value[: max_chars - 1]}…"
    return html.escape(" ".join(short.split()), quote=False)


def layout(xaxis: Mapping[str, Any], yaxis: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A layout in the page's style."""
    return {
        "xaxis": {**grid(), "showline": True, **xaxis},
        "yaxis": {**grid(), **yaxis},
        "margin": {"l": 52, "r": 12, "t": 30, "b": 42},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink-soft)", "size": 12},
        "hoverlabel": {"bgcolor": "var(--panel)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        **more,
    }


def grid() -> dict[str, Any]:
    """What every axis has."""
    return {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "separatethousands": True,
    }


def share_axis(title: str) -> dict[str, Any]:
    """An axis from 0 to 100 %."""
    return {"title": {"text": title}, "range": [0, 1.02], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}


def line_at(value: float, axis: str = "x") -> dict[str, Any]:
    """A quiet line across the whole plot at one value of an axis."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    line = {"color": "var(--muted)", "width": 1.25}
    return {"type": "line", f"{other}ref": "paper", **ends, "line": line, "layer": "below"}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis over positive values, with a little room; a range even for equal ones.

    1, 2, 5 are ticks within two decades; beyond, where their labels would touch, whole decades.
    """
    ends = math.log10(low), math.log10(high)
    pad = max(0.04 * (ends[1] - ends[0]), 0.05)
    bottom, top = round(ends[0] - pad, 4), round(ends[1] + pad, 4)
    axis: dict[str, Any] = {"type": "log", "range": [bottom, top], "minor": {"ticks": ""}}
    if top - bottom < 0.5:
        return {**axis, "dtick": "D2"}
    return {**axis, "tickvals": _ladder(bottom, top, (1, 2, 5) if top - bottom < 1.8 else (1,))}


def _ladder(low: float, high: float, steps: Sequence[int]) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [float(f"{value:.1g}") for value in values if low <= math.log10(value) <= high]
