"""The table of checks: every number beside a dot-and-interval picture with its gate and noise floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtwin.reports.numbers import MISSING
from kvtwin.reports.pages.markup import text, typeset, verdict_badge, verdict_class
from kvtwin.reports.words import Cells, cells, is_magnitude
from kvtwin.validate.result import Check

# Heading, how the column sorts ("" not at all), and whether it is text (left aligned).
_HEADS = (
    ("Run", "text", True),
    ("Level", "text", True),
    ("Metric", "text", True),
    ("Verdict", "text", True),
    ("Measured", "number", False),
    ("Simulated", "number", False),
    ("Error", "number", False),
    ("Error, interval, gate", "", False),
    ("95 % interval", "", False),
    ("Noise floor", "number", False),
    ("Gate", "number", False),
    ("n", "number", False),
    ("Note", "", True),
)
_SELECTS = ("run", "level", "verdict")
_MIDDLE, _GATE, _EDGE = 66, 44, 60  # of the picture: its zero, how far the gates stand from it, where it ends


def checks_section(checks: Sequence[Check]) -> str:
    """The section with its filters; complete without a script."""
    if not checks:
        return '<section><h2 id="checks">Checks</h2><p class="soft">No check was made.</p></section>'
    return f"""<section aria-labelledby="checks">
<h2 id="checks">Checks</h2>
<p class="soft">Failed gates first. Each row compares one number of the simulation with the recording; the error is relative to the
measurement: simulated / measured &minus; 1. In the picture, the dot is the error and the bar its 95&nbsp;% interval,
between the ticks of the gate; the shaded band is the noise floor. Without a gate, the picture reaches to the largest
of them.</p>
{filter_form("checks-table", _SELECTS, "metric, run or note", '<label class="check"><input type="checkbox" name="notes"> whole notes</label>')}
<div class="panel scroll tall" tabindex="0" role="region" aria-label="Table of checks">
<table id="checks-table" class="sortable compact"><caption>Every check of every recorded run</caption>
<thead><tr>{column_heads(_HEADS)}</tr></thead>
<tbody>
{"".join(_check_row(check) for check in sorted(checks, key=lambda check: check.verdict != "fail"))}</tbody></table></div>
</section>"""


def filter_form(table: str, selects: Sequence[str], searched: str, more: str = "") -> str:
    """Filters of a table, shown by the script: a select per data attribute of its rows, and a search."""
    choices = "".join(
        f'<label>{name.capitalize()} <select name="{name}"><option value="">all</option></select></label>'
        for name in selects
    )
    return f"""<form class="filters" aria-label="Filters" data-table="{table}" hidden>{choices}
<label>Search <input type="search" name="search" placeholder="{text(searched)}"></label>{more}
<output aria-live="polite"></output></form>"""


def column_heads(heads: Sequence[tuple[str, str, bool]]) -> str:
    """Heading cells: (name, how it sorts or "", whether it is text)."""
    return "".join(
        f'<th scope="col"{" class=text" if is_text else ""}{f" data-sort={sort}" if sort else ""}>{name}</th>'
        for name, sort, is_text in heads
    )


def number_cell(value: float | None, shown: str, kind: str = "") -> str:
    """A number as shown, beside the exact value that sorting uses; empty where it is unknown."""
    exact = "" if value is None or shown == MISSING else repr(value)
    attributes = f' class="{kind}"' if kind else ""
    return f'<td{attributes} data-value="{exact}">{typeset(shown)}</td>'


def _check_row(check: Check) -> str:
    shown = cells(check)
    columns = [
        f'<td class="text">{text(shown.run)}</td>',
        f'<td class="text">{text(shown.level)}</td>',
        f'<th scope="row" class="text"><code>{text(shown.metric)}</code></th>',
        f'<td class="text" data-value="{text(check.verdict)}">{verdict_badge(check.verdict)}</td>',
        number_cell(check.measured, shown.measured),
        number_cell(check.simulated, shown.simulated),
        number_cell(check.error, shown.error, "error"),
        f"<td>{_picture(check, shown)}</td>",
        f"<td>{typeset(shown.interval)}</td>",
        number_cell(check.noise_floor, shown.noise_floor),
        number_cell(check.threshold, shown.threshold),
        number_cell(check.n, shown.n),
        f'<td class="text note"><span title="{text(shown.note)}">{text(shown.note)}</span></td>',
    ]
    data = " ".join(f'data-{key}="{text(getattr(shown, key))}"' for key in _SELECTS)
    return f"<tr {data}>{''.join(columns)}</tr>\n"


def _picture(check: Check, shown: Cells) -> str:
    """A small picture of the error; empty where there is none. The row has the same in numbers."""
    if not math.isfinite(check.error):
        return ""
    known = [abs(end) for end in (*(check.interval or ()), check.error, check.noise_floor or 0.0) if math.isfinite(end)]
    scale = _GATE / (check.threshold or max(known) or 1.0)

    def at(ratio: float) -> float:
        return round(_MIDDLE + max(-_EDGE, min(_EDGE, ratio * scale)), 1)

    parts = []
    one_sided = is_magnitude(check)
    if check.noise_floor:
        low, high = at(0.0 if one_sided else -check.noise_floor), at(check.noise_floor)
        parts.append(f'<rect class="floor" x="{low}" y="2" width="{high - low:.1f}" height="18"/>')
    parts.append(f'<line class="zero" x1="{_MIDDLE}" x2="{_MIDDLE}" y1="2" y2="20"/>')
    if check.threshold:
        gates = (_MIDDLE + _GATE,) if one_sided else (_MIDDLE - _GATE, _MIDDLE + _GATE)
        parts += [f'<line class="gate" x1="{x}" x2="{x}" y1="4" y2="18"/>' for x in gates]
    if check.interval and all(math.isfinite(end) for end in check.interval):
        low, high = (at(end) for end in check.interval)
        parts.append(f'<line class="interval" x1="{low}" x2="{high}" y1="11" y2="11"/>')
    parts.append(f'<circle class="point" cx="{at(check.error)}" cy="11" r="4"/>')
    words = f"error {shown.error}, interval {shown.interval}, noise floor {shown.noise_floor}, gate {shown.threshold}"
    style = verdict_class(check.verdict)
    return f'<svg class="strip {style}" viewBox="0 0 132 22" aria-hidden="true"><title>{text(words)}</title>{"".join(parts)}</svg>'
