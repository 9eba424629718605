"""Why the end-to-end numbers differ: the waterfall of causes, its bars with their intervals."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from kvtwin.reports.numbers import MISSING, percent, percent_interval
from kvtwin.reports.pages.markup import Table
from kvtwin.reports.pages.plots import MINUS, Figure, grid, layout, plotly_text
from kvtwin.reports.words import sentence_case
from kvtwin.validate.result import Attribution, Check, Part

_MAX_WATERFALLS = 6  # metrics drawn, means first; the table has them all
_ACROSS = 3  # waterfalls beside one another; on a phone one, and as many below one another
_ROOM = 0.5  # how much whiskers may widen the axis to either side, as a share of what the bars need
_LINE = 17  # characters of a layer's name

Interval = tuple[float, float]


def waterfall_figure(attributions: Sequence[Attribution], checks: Sequence[Check] = ()) -> Figure:
    """What each layer adds to the error of each metric, in percent of the measurement.

    Args:
        attributions: of one run.
        checks: of the same run; they know the intervals of the whole errors.
    """
    title = "Causes of the end-to-end error"
    known = [found for found in attributions if found.parts]
    if not known:
        why = next((found.note for found in attributions if found.note), "no layer was replaced by its recording")
        return Figure("causes", title, f"Not attributed: {why}.", None, columns=12)
    whole = {check.metric: check.interval for check in checks if check.interval is not None}
    drawn = [_waterfall(found, whole.get(found.metric)) for found in _first(known)]
    layers = list(dict.fromkeys(part.layer for found in known for part in found.parts))
    rows = [
        (
            found.metric,
            *(_cell(part.change, part.interval) if (part := _part(found, layer)) else MISSING for layer in layers),
            _cell(_error(found), whole.get(found.metric)),
            found.blamed or MISSING,
        )
        for found in known
    ]
    table = Table("Change of each metric by layer", ("metric", *layers, "error", "blamed"), rows)
    spec = {**_grid_of(drawn, _ACROSS), "narrow": _grid_of(drawn[:_ACROSS], 1)}
    return Figure("causes", title, _text(known, clipped=_range(drawn)[2]), spec, table, columns=12, notes=_notes(known))


def _first(found: Sequence[Attribution]) -> list[Attribution]:
    """Those that are drawn: means first."""
    return sorted(found, key=lambda one: not one.metric.endswith("_mean"))[:_MAX_WATERFALLS]


def _text(found: Sequence[Attribution], *, clipped: bool) -> str:
    blamed = [f"{one.metric}: {one.blamed}" for one in found if one.blamed]
    lead = f"Most of it comes from: {', '.join(blamed)}." if blamed else "No layer is to blame beyond doubt."
    rest = (
        "The parts add up to the error. Whiskers are 95 % intervals: a bar whose whisker reaches back to where the bar "
        "begins is nobody's."
    )
    long = " Whiskers that end at the edge are longer: see the numbers." if clipped else ""
    return f"{lead} {rest}{long}"


def _notes(found: Sequence[Attribution]) -> list[str]:
    """Each remark once, with the metrics that it is about where it is not about all."""
    metrics: dict[str, list[str]] = {}
    for one in found:
        for note in filter(None, one.note.rstrip(".").split("; ")):
            metrics.setdefault(note, []).append(one.metric)
    everyone = [one.metric for one in found]
    return [
        f"{who}: {note}." if (who := _who(about, everyone)) else f"{sentence_case(note)}."
        for note, about in metrics.items()
    ]


def _who(about: Sequence[str], everyone: Sequence[str]) -> str:
    """Some of the metrics, in the fewest words; nothing where it is all of them."""
    others = [metric for metric in everyone if metric not in about]
    return ", ".join(about) if len(about) <= len(others) else f"All but {', '.join(others)}" if others else ""


def _part(found: Attribution, layer: str) -> Part | None:
    return next((part for part in found.parts if part.layer == layer), None)


def _cell(change: float, interval: Interval | None) -> str:
    """A bar and its 95 % interval."""
    return percent(change) if interval is None else f"{percent(change)} ({percent_interval(*interval)})"


def _error(found: Attribution) -> float:
    return found.simulated / found.measured - 1 if found.measured else math.nan


@dataclass(frozen=True, slots=True)
class _Waterfall:
    """One metric's bars, in percent of the measurement; a change that is unknown is no bar.

    Attributes:
        names: of the layers, then "error".
        begins, ends: of each bar.
        intervals: of each bar's end; None where unknown.
    """

    metric: str
    names: tuple[str, ...]
    begins: tuple[float, ...]
    ends: tuple[float, ...]
    intervals: tuple[Interval | None, ...]


def _waterfall(found: Attribution, whole: Interval | None) -> _Waterfall:
    parts = [part for part in found.parts if math.isfinite(part.change)]
    ends = [100 * total for total in accumulate(part.change for part in parts)]
    begins = [0.0, *ends][: len(ends)]
    doubts = [part.interval for part in parts]
    error = 100 * _error(found)
    if math.isfinite(error):
        begins, ends, doubts = [*begins, 0.0], [*ends, error], [*doubts, whole]
    names = (*(part.layer for part in parts), "error")
    intervals = tuple(
        (begin + 100 * doubt[0], begin + 100 * doubt[1]) if doubt and all(map(math.isfinite, doubt)) else None
        for begin, doubt in zip(begins, doubts, strict=True)
    )
    return _Waterfall(found.metric, names[: len(ends)], tuple(begins), tuple(ends), intervals)


def _grid_of(drawn: Sequence[_Waterfall], across: int) -> dict[str, Any]:
    """Waterfalls that share one percent axis; layers are named once a row."""
    low, high, _ = _range(drawn)
    num_rows = -(-len(drawn) // across)
    layers = list(dict.fromkeys(name for one in drawn for name in one.names if name != "error"))
    names = [_in_lines(name) for name in (*layers, "error")]
    data: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    titles = []
    for index, one in enumerate(drawn):
        row, column = divmod(index, across)
        x, y = (f"{number + 1}" if number else "" for number in (index, row))
        left, top = column / across, 1 - row / num_rows
        bottom = 1 - (row + 1) / num_rows + (0.2 / num_rows if row + 1 < num_rows else 0)
        percents = {"range": [low, high], "ticksuffix": " %", "nticks": 5, "tickangle": 0}
        axes[f"xaxis{x}"] = {
            **grid(),
            **percents,
            "zeroline": True,
            "zerolinecolor": "var(--muted)",
            "domain": [round(left, 4), round(left + 1 / across - (0.02 if across > 1 else 0), 4)],
            "anchor": f"y{y}",
        }
        rows = {"type": "category", "categoryarray": names, "range": [len(names) - 0.5, -0.5], "showgrid": False}
        axes[f"yaxis{y}"] = {**grid(), **rows, "domain": [round(bottom, 4), round(top - 0.12 / num_rows, 4)]}
        data += _traces(one, f"x{x}", f"y{y}")
        titles.append(_title(one, round(left, 4), round(top - 0.12 / num_rows, 4)))
    return {
        "data": data,
        "layout": layout(axes.pop("xaxis"), axes.pop("yaxis"), **axes, annotations=titles, bargap=0.35),
    }


def _range(drawn: Sequence[_Waterfall]) -> tuple[float, float, bool]:
    """The percent axis: all bars, and the whiskers as far as they leave the bars large enough to be seen."""
    bars = [0.0, *(value for one in drawn for value in (*one.begins, *one.ends))]
    whiskers = [end for one in drawn for interval in one.intervals if interval for end in interval]
    low, high = min(bars), max(bars)
    room = _ROOM * max(high - low, 0.1)
    begin, end = max(min([low, *whiskers]), low - room), min(max([high, *whiskers]), high + room)
    clipped = any(not begin <= value <= end for value in whiskers)
    pad = 0.03 * (end - begin)
    return round(begin - pad, 4), round(end + pad, 4), clipped


def _title(one: _Waterfall, left: float, top: float) -> dict[str, Any]:
    error = f" {percent(one.ends[-1] / 100).replace('-', MINUS)}" if "error" in one.names else ""
    place = {"xref": "paper", "yref": "paper", "x": left, "y": top, "xanchor": "left", "yanchor": "bottom"}
    return {**place, "text": f"<b>{plotly_text(one.metric)}</b>{error}", "showarrow": False}


def _traces(one: _Waterfall, xaxis: str, yaxis: str) -> list[dict[str, Any]]:
    """Bars that begin where the last one ended, a quiet line from each to the next, and whiskers."""
    names = [_in_lines(name) for name in one.names]
    axes = {"xaxis": xaxis, "yaxis": yaxis, "showlegend": False}
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": plotly_text(one.metric),
        "y": names,
        "base": [round(begin, 4) for begin in one.begins],
        "x": [round(end - begin, 4) for begin, end in zip(one.begins, one.ends, strict=True)],
        "marker": {"color": [_colour(*bar) for bar in zip(one.names, one.begins, one.ends, strict=True)]},
        "opacity": 0.75,  # so that a whisker is seen on its bar
        "customdata": [_hover(*bar) for bar in zip(one.begins, one.ends, one.intervals, strict=True)],
        "hovertemplate": "%{y}: %{customdata}<extra></extra>",
    }
    return [{**axes, **_connectors(names, one.ends)}, {**axes, **bars}, {**axes, **_whiskers(names, one)}]


def _connectors(names: Sequence[str], ends: Sequence[float]) -> dict[str, Any]:
    """From the end of each bar down to the next; null interrupts the line."""
    pairs = [(before, after, round(end, 4)) for (before, after), end in zip(pairwise(names), ends, strict=False)]
    return {
        "type": "scatter",
        "mode": "lines",
        "y": [name for before, after, _ in pairs for name in (before, after, None)],
        "x": [value for *_, end in pairs for value in (end, end, None)],
        "line": {"color": "var(--muted)", "width": 1},
        "hoverinfo": "skip",
    }


def _whiskers(names: Sequence[str], one: _Waterfall) -> dict[str, Any]:
    known = [row for row in zip(names, one.ends, one.intervals, strict=True) if row[2]]
    return {
        "type": "scatter",
        "mode": "markers",
        "y": [name for name, *_ in known],
        "x": [round(end, 4) for _, end, _ in known],
        "marker": {"size": 1, "color": "var(--ink)"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [round(interval[1] - end, 4) for _, end, interval in known if interval],
            "arrayminus": [round(end - interval[0], 4) for _, end, interval in known if interval],
            "color": "var(--ink)",
            "thickness": 1.5,
            "width": 3,
        },
        "hoverinfo": "skip",
    }


def _colour(name: str, begin: float, end: float) -> str:
    if name == "error":
        return "var(--other)"
    return "var(--too-slow)" if end >= begin else "var(--too-fast)"


def _hover(begin: float, end: float, interval: Interval | None) -> str:
    doubt = "" if interval is None else percent_interval(*((limit - begin) / 100 for limit in interval))
    return f"{percent((end - begin) / 100)}{doubt and f'<br>95 % interval {doubt}'}"


def _in_lines(name: str) -> str:
    """A layer's name as a label of a few short lines."""
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(name, _LINE)[:3]) or " "
