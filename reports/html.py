"""The report as one self-contained HTML page: no network, no file beside it, light and dark.

Every text from outside is escaped, and a content security policy in the page lets only the two scripts
that it was built with run, so that even a mistake in the escaping could not execute anything.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvtwin.reports.figures import MAX_PARITY_POINTS, Figure, figures
from kvtwin.reports.numbers import MISSING, count, number
from kvtwin.reports.words import (
    Cells,
    cells,
    clock_sentence,
    is_magnitude,
    noise_floor_sentence,
    summary,
    title,
    verdict_word,
)
from kvtwin.traces.files import write_text
from kvtwin.traces.time import to_seconds
from kvtwin.validate.result import Check, Comparison, TargetReport

# Points of all parity plots of one page (about 20 bytes each): a page of many runs stays small too.
_MAX_PAGE_POINTS = 60_000
_MINUS = "\N{MINUS SIGN}"
_MARKS = {"pass": "✓", "fail": "✗", "not distinguishable": "≈", "not judged": "○", "no gate": "○"}
_FACTS = ("hardware", "model", "engine")


def render_html(report: TargetReport) -> str:
    """The whole page; the same report gives the same bytes."""
    page_script, plotly = _asset("page.js"), _plotly_source()
    parity_points = min(MAX_PARITY_POINTS, _MAX_PAGE_POINTS // max(len(report.comparisons), 1))
    drawn = [figures(comparison, parity_points) for comparison in report.comparisons]
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {_hashes(page_script, plotly)}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title(report))}: {verdict_word(report)} · kvtwin</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#checks-heading">Skip to the checks</a>
{_header(report)}
<main class="wrap">
{_checks_section(report.checks)}
{"".join(_run_section(index, run, drawn[index]) for index, run in enumerate(report.comparisons))}
{_records_section("profile", "Profile", report.profile)}
{_records_section("provenance", "Provenance", report.provenance)}
</main>
<footer class="wrap">Made by kvtwin. This page needs no network; figures drawn with plotly.js (MIT licence).</footer>
<script type="application/json" id="figures">{_script_json(_specs(drawn))}</script>
<script type="application/octet-stream" id="plotly">{_packed(plotly) if any(_specs(drawn)) else ""}</script>
<script>{page_script}</script>
</body>
</html>
"""


def write_html(report: TargetReport, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path`, replacing an older one: all of it or nothing. Folders on the way are made.

    Raises:
        InputError: the place cannot be written to.
    """
    return write_text(path, render_html(report))


# -- parts of the page ------------------------------------------------------------------------------------


def _header(report: TargetReport) -> str:
    verdict = verdict_word(report)
    facts = [(key.capitalize(), report.target[key]) for key in _FACTS if report.target.get(key)]
    facts += [("Recorded runs", str(len(report.comparisons))), ("Checks", str(len(report.checks)))]
    pairs = "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts)
    description = report.target.get("description", "")
    links = [("checks-heading", "Checks")]
    links += [(f"run-{index}", run.name) for index, run in enumerate(report.comparisons)]
    links += [(key, key.capitalize()) for key in ("profile", "provenance") if getattr(report, key)]
    items = "".join(f'<li><a href="#{key}">{_text(name)}</a></li>' for key, name in links)
    return f"""<header><div class="wrap">
<p class="brand"><b>kvtwin</b> fidelity report</p>
<h1>{_text(title(report))}</h1>
{f'<p class="description">{_text(description)}</p>' if description else ""}
<div class="lead"><span class="badge {_verdict_class(verdict)}">{_MARKS[verdict]} {verdict}</span>
<p id="summary">{_typeset(summary(report))}</p></div>
<dl class="facts">{pairs}</dl>
<nav aria-label="Contents"><ul>{items}</ul></nav>
</div></header>"""


def _checks_section(checks: Sequence[Check]) -> str:
    if not checks:
        return '<section><h2 id="checks-heading">Checks</h2><p class="soft">No check was made.</p></section>'
    heads = "".join(_column_head(*head) for head in _HEADS)
    selects = "".join(
        f'<label>{name.capitalize()}<select name="{name}"><option value="">all</option></select></label>'
        for name in ("run", "level", "verdict")
    )
    return f"""<section aria-labelledby="checks-heading">
<h2 id="checks-heading">Checks</h2>
<p class="soft">Each row compares one number of the simulation with the recording. The error is relative to the
measurement: simulated / measured &minus; 1. In the picture of each row, the dot is the error and the bar its 95&nbsp;%
interval, between the limits that the gate allows; the shaded band is the noise floor.</p>
<form id="filters" class="filters" hidden>{selects}<output id="shown" aria-live="polite"></output></form>
<div class="panel scroll" tabindex="0" role="region" aria-label="Table of checks">
<table id="checks"><caption>Every check of every recorded run</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{"".join(_check_row(check) for check in checks)}</tbody></table></div>
</section>"""


# Heading, how the column sorts ("" not at all), and whether it is text (left aligned).
_HEADS = (
    ("Run", "text", True),
    ("Level", "text", True),
    ("Metric", "text", True),
    ("Measured", "number", False),
    ("Simulated", "number", False),
    ("Error", "number", False),
    ("95 % interval", "", False),
    ("Noise floor", "number", False),
    ("Gate", "number", False),
    ("Verdict", "text", True),
    ("Within the gates", "", False),
    ("n", "number", False),
    ("Note", "", True),
)


def _column_head(name: str, sort: str, is_text: bool) -> str:
    attributes = (' class="text"' if is_text else "") + (f' data-sort="{sort}"' if sort else "")
    return f'<th scope="col"{attributes}>{name}</th>'


def _check_row(check: Check) -> str:
    shown = cells(check)
    mark = f"{_MARKS[check.verdict]} {check.verdict}"
    columns = [
        f'<td class="text">{_text(shown.run)}</td>',
        f'<td class="text">{_text(shown.level)}</td>',
        f'<th scope="row" class="text" data-value="{_text(check.metric)}"><code>{_text(check.metric)}</code></th>',
        _number_cell(check.measured, shown.measured),
        _number_cell(check.simulated, shown.simulated),
        _number_cell(check.error, shown.error, "error"),
        f"<td>{_typeset(shown.interval)}</td>",
        _number_cell(check.noise_floor, shown.noise_floor),
        _number_cell(check.threshold, shown.threshold),
        f'<td class="text"><span class="verdict {_verdict_class(check.verdict)}">{mark}</span></td>',
        f"<td>{_strip(check)}</td>",
        _number_cell(check.n, shown.n),
        f'<td class="text note">{_text(check.note)}</td>',
    ]
    return f"<tr {_row_data(shown)}>{''.join(columns)}</tr>\n"


def _row_data(shown: Cells) -> str:
    """What the filters look at."""
    return " ".join(f'data-{key}="{_text(getattr(shown, key))}"' for key in ("run", "level", "verdict"))


def _number_cell(value: float | None, text: str, kind: str = "") -> str:
    """A number as shown, beside the exact value that sorting uses; empty where it is unknown."""
    exact = "" if value is None or text == MISSING else repr(value)
    attributes = f' class="{kind}"' if kind else ""
    return f'<td{attributes} data-value="{exact}">{_typeset(text)}</td>'


def _strip(check: Check) -> str:
    """A small picture of the error between its gates; empty without a gate. The row has the same in numbers."""
    if not check.threshold or not math.isfinite(check.error):
        return ""
    scale = 44 / check.threshold  # the gates stand 44 units left and right of the middle; 60 is the edge

    def at(ratio: float) -> str:
        return f"{66 + max(-60.0, min(60.0, ratio * scale)):.1f}"

    low_floor, floor = (0.0 if is_magnitude(check) else -(check.noise_floor or 0.0)), check.noise_floor or 0.0
    parts = []
    if floor:
        width = float(at(floor)) - float(at(low_floor))
        parts.append(f'<rect class="floor" x="{at(low_floor)}" y="2" width="{width:.1f}" height="18"/>')
    parts.append('<line class="zero" x1="66" x2="66" y1="2" y2="20"/>')
    gates = (22, 110) if not is_magnitude(check) else (110,)
    parts += [f'<line class="gate" x1="{x}" x2="{x}" y1="4" y2="18"/>' for x in gates]
    if check.interval:
        low, high = (at(end) for end in check.interval)
        parts.append(f'<line class="interval" x1="{low}" x2="{high}" y1="11" y2="11"/>')
    parts.append(f'<circle class="point" cx="{at(check.error)}" cy="11" r="4"/>')
    style = _verdict_class(check.verdict)
    return f'<svg class="strip {style}" viewBox="0 0 132 22" aria-hidden="true">{"".join(parts)}</svg>'


def _run_section(index: int, comparison: Comparison, drawn: Sequence[Figure]) -> str:
    facts = [count(comparison.measured.requests.num_rows, "request")]
    if comparison.predictions is not None:
        facts.append(count(comparison.predictions.num_rows, "step"))
    duration = _duration_s(comparison)
    facts += [f"{number(duration)} s recorded"] if duration else []
    sentences = [noise_floor_sentence(comparison), clock_sentence(comparison)]
    soft = "".join(f'<p class="soft">{_text(text)}</p>' for text in [", ".join(facts) + ".", *sentences] if text)
    return f"""<section id="run-{index}" aria-labelledby="run-{index}-heading">
<h2 id="run-{index}-heading">{_text(comparison.name)}</h2>
{soft}
<div class="grid">{"".join(_figure(index, figure) for figure in drawn)}</div>
</section>
"""


def _duration_s(comparison: Comparison) -> float:
    """From the first arrival to the last finish of the recording; 0 where no finish is known."""
    requests = comparison.measured.requests
    finish = requests["finish_ns"].drop_null().to_numpy()
    return to_seconds(int(finish.max()) - int(requests["arrival_ns"][0].as_py())) if finish.size else 0.0


def _figure(index: int, figure: Figure) -> str:
    key = f"figure-{index}-{figure.key}"
    plot = ""
    if figure.spec is not None:
        plot = f'<div class="plot" id="{key}" role="img" aria-label="{_text(f"{figure.title}. {figure.text}")}"></div>'
    wide = " wide" if figure.wide else ""
    return f"""<figure class="panel{wide}"><figcaption><h3>{_text(figure.title)}</h3>
<p>{_typeset(figure.text)}</p></figcaption>{plot}</figure>
"""


def _records_section(key: str, heading: str, records: Mapping[str, Any]) -> str:
    if not records:
        return ""
    return f"""<section id="{key}" aria-labelledby="{key}-heading"><h2 id="{key}-heading">{heading}</h2>
<div class="panel records">{_records(records)}</div></section>
"""


def _records(value: Any) -> str:
    """Nested settings as nested definition lists; anything else as escaped text."""
    if isinstance(value, Mapping):
        pairs = (
            f"<dt>{_text(str(key).replace('_', ' '))}</dt><dd>{_records(item)}</dd>" for key, item in value.items()
        )
        return f"<dl>{''.join(pairs)}</dl>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping) for item in value):
            return "".join(_records(item) for item in value)
        return ", ".join(_records(item) for item in value) or MISSING
    if value is None:
        return MISSING
    if isinstance(value, float):
        return _typeset(number(value))
    return _text(str(value))


# -- text and scripts -------------------------------------------------------------------------------------


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _typeset(text: str) -> str:
    """Escaped text whose numbers have a true minus sign and whose missing value is a dash."""
    if text == MISSING:
        return "&ndash;"
    words = [f"{_MINUS}{word[1:]}" if word[0] == "-" and word[1:2].isdigit() else word for word in text.split()]
    return _text(" ".join(words)).replace(" %", "&nbsp;%")


def _verdict_class(verdict: str) -> str:
    return f"is-{verdict.replace(' ', '-')}"


def _specs(drawn: Sequence[Sequence[Figure]]) -> dict[str, Any]:
    return {
        f"figure-{index}-{figure.key}": figure.spec
        for index, run_figures in enumerate(drawn)
        for figure in run_figures
        if figure.spec is not None
    }


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hashes(*scripts: str) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


@cache
def _asset(name: str) -> str:
    return (files("kvtwin.reports") / "assets" / name).read_text(encoding="utf-8")


@cache
def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs  # heavy: only where a page is made

    source: str = get_plotlyjs()
    return source


@cache
def _packed(source: str) -> str:
    """gzip and base64: the library takes 4.8 MB as text, and less than half of that so; no time stamp inside."""
    return base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode()
