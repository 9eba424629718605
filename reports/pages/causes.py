"""Why the end-to-end numbers differ: the waterfall of causes, and the first step at which two schedulers part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from kvtwin.reports.numbers import MISSING, count, number, percent
from kvtwin.reports.pages.markup import Table, plain_table, typeset
from kvtwin.reports.pages.plots import Figure, grid, layout, plotly_text
from kvtwin.validate.result import Attribution, Divergence, Part, ScheduleFinding

_MAX_WATERFALLS = 6  # metrics side by side, means first; the table has them all
_MAX_MEMBERS = 24  # of a batch beside the other, around the first difference


def waterfall_figure(attributions: Sequence[Attribution]) -> Figure:
    """What each layer adds to the error of each metric, in percent of the measurement."""
    title = "Causes of the end-to-end error"
    known = [found for found in attributions if found.parts]
    if not known:
        why = next((found.note for found in attributions if found.note), "no layer was replaced by its recording")
        return Figure("causes", title, f"Not attributed: {why}.", None, columns=8)
    drawn = sorted(known, key=lambda found: not found.metric.endswith("_mean"))[:_MAX_WATERFALLS]
    data = [_waterfall(found, "" if index == 0 else str(index + 1)) for index, found in enumerate(drawn)]
    spec = {"data": data, "layout": _side_by_side(drawn)}
    layers = list(dict.fromkeys(part.layer for found in known for part in found.parts))
    rows = [
        (
            found.metric,
            *(_cell(parts[layer]) if layer in (parts := _parts(found)) else MISSING for layer in layers),
            percent(_error(found)),
            found.blamed or MISSING,
        )
        for found in known
    ]
    table = Table("Change of each metric by layer", ("metric", *layers, "error", "blamed"), rows)
    return Figure("causes", title, _waterfall_text(known), spec, table, columns=8)


def _waterfall_text(found: Sequence[Attribution]) -> str:
    errors = f"Error of {', '.join(f'{one.metric} {percent(_error(one))}' for one in found)}."
    blamed = [f"{one.metric}: {one.blamed}" for one in found if one.blamed]
    text = f"Most of it comes from: {', '.join(blamed)}." if blamed else "No layer is to blame beyond doubt."
    notes = list(dict.fromkeys(one.note.rstrip(".") for one in found if one.note))
    return " ".join(
        [
            errors,
            text,
            "The parts add up to the error; a bar whose 95 % interval holds zero is nobody's.",
            *(f"{note}." for note in notes),
        ]
    )


def _parts(found: Attribution) -> dict[str, Part]:
    return {part.layer: part for part in found.parts}


def _cell(part: Part) -> str:
    """A bar and its 95 % interval."""
    if part.interval is None:
        return percent(part.change)
    return f"{percent(part.change)} ({' to '.join(map(percent, part.interval))})"


def _error(found: Attribution) -> float:
    return found.simulated / found.measured - 1 if found.measured else math.nan


def _waterfall(found: Attribution, axis: str) -> dict[str, Any]:
    """plotly leaves a bar out whose height is null: a change that is unknown."""
    changes = [100 * part.change if math.isfinite(part.change) else None for part in found.parts]
    return {
        "type": "waterfall",
        "xaxis": f"x{axis}",
        "yaxis": "y",
        "measure": ["relative"] * len(changes) + ["total"],
        "x": [*(plotly_text(part.layer, 18) for part in found.parts), "error"],
        "y": [*changes, 0],
        "name": plotly_text(found.metric),
        "showlegend": False,
        "increasing": {"marker": {"color": "var(--too-slow)"}},
        "decreasing": {"marker": {"color": "var(--too-fast)"}},
        "totals": {"marker": {"color": "var(--all)"}},
        "connector": {"line": {"color": "var(--muted)", "width": 1}},
        "customdata": [*(_doubt(part) for part in found.parts), ""],
        "hovertemplate": "%{x}: %{delta:+.2f} %%{customdata}<br>so far %{final:+.2f} %<extra></extra>",
    }


def _doubt(part: Part) -> str:
    if part.interval is None:
        return ""
    return f"<br>95 % interval {' to '.join(map(percent, part.interval))}"


def _side_by_side(found: Sequence[Attribution]) -> dict[str, Any]:
    """One category axis per metric, one percent axis for all."""
    width = 1 / len(found)
    axes: dict[str, Any] = {}
    for index, one in enumerate(found):
        key = "xaxis" if index == 0 else f"xaxis{index + 1}"
        domain = [round(index * width, 4), round((index + 1) * width - (0.02 if index + 1 < len(found) else 0), 4)]
        name = {"text": plotly_text(one.metric), "standoff": 6}
        axes[key] = {**grid(), "type": "category", "domain": domain, "title": name, "showgrid": False, "anchor": "y"}
    y_axis = {
        "title": {"text": "share of the measured value"},
        "ticksuffix": " %",
        "zeroline": True,
        "zerolinecolor": "var(--muted)",
    }
    return layout(axes.pop("xaxis"), y_axis, **axes)


# -- schedulers ---------------------------------------------------------------------------------------------


def schedule_html(findings: Sequence[ScheduleFinding]) -> str:
    """How far the two schedulers agree, and where they first part, side by side."""
    if not findings:
        body = '<p class="soft">Not compared: no scheduler log of this run was replayed.</p>'
    else:
        body = "".join(_finding(found) for found in findings)
    return f'<div class="panel c12 schedule"><h4>Scheduler decisions, step by step</h4>{body}</div>'


def _finding(found: ScheduleFinding) -> str:
    share = found.num_identical / found.num_steps if found.num_steps else math.nan
    lead = f"{found.num_identical:,} of {count(found.num_steps, 'step')} identical ({percent(share, signed=False)})."
    judged = f" Not judged: {', '.join(found.not_judged)}." if found.not_judged else ""
    parted = _divergence(found.first) if found.first else ""
    return f"<p>{typeset(lead + judged)}</p>{parted}"


def _divergence(first: Divergence) -> str:
    again = "never again" if first.resync_step is None else f"from step {first.resync_step:,}"
    lead = f"They first part at step {first.step:,} ({first.what}) and agree {again}."
    batches = [_batch(side) for side in (first.measured, first.simulated)]
    keys = [key for key in {**first.measured, **first.simulated} if key != "batch"]
    rows = [
        (key.replace("_", " "), *(_plain(side.get(key)) for side in (first.measured, first.simulated))) for key in keys
    ]
    queues = plain_table(Table("State at that step", ("", "measured", "simulated"), rows, compare=True)) if rows else ""
    members = _members(*batches) if any(batches) else ""
    return f"<p>{typeset(lead)}</p><div class='beside'>{members}{queues}</div>"


def _batch(side: Mapping[str, Any]) -> list[str]:
    """The batch in order, each member as text: a file may hold anything here."""
    batch = side.get("batch")
    return [_member(member) for member in batch] if isinstance(batch, list | tuple) else []


def _member(member: Any) -> str:
    if isinstance(member, list | tuple) and len(member) == 3:
        return f"{member[0]}: {member[2]} new on {member[1]} cached"
    return _plain(member)


def _members(measured: Sequence[str], simulated: Sequence[str]) -> str:
    """Both batches beside each other, from a little before the first place where they differ."""
    pairs = list(zip_longest(measured, simulated, fillvalue=MISSING))
    differs = next((place for place, (one, two) in enumerate(pairs) if one != two), 0)
    begin = max(0, differs - 3)
    rows = [(str(place), *pairs[place]) for place in range(begin, min(begin + _MAX_MEMBERS, len(pairs)))]
    caption = f"The batch: {len(measured):,} members measured, {len(simulated):,} simulated"
    if len(rows) < len(pairs):
        caption += f"; {len(rows)} of them shown, from place {begin}"
    return plain_table(Table(caption, ("place", "measured", "simulated"), rows, compare=True))


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value[:_MAX_MEMBERS])) + (" …" if len(value) > _MAX_MEMBERS else "") or "none"
    return str(value)
