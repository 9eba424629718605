"""The list of hardware targets: traffic light, headline errors, trend, engine, age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtwin.reports.numbers import count
from kvtwin.reports.pages.checks_table import column_heads, filter_form, number_cell
from kvtwin.reports.pages.headline import METRICS, Headline, gates_held, headlines, limits
from kvtwin.reports.pages.markup import text, typeset, verdict_badge, verdict_class
from kvtwin.reports.pages.shell import render_page
from kvtwin.reports.pages.trend import date_of, dated, recorded_on, sparkline
from kvtwin.reports.words import title, verdict_word
from kvtwin.validate.checks_json import StoredReport

_SHOWN = ("step_mape", "ttft_mean", "tpot_mean")
_HEADS = (
    ("Verdict", "text", True),
    ("Target", "text", True),
    ("Hardware", "text", True),
    ("Engine", "text", True),
    *((METRICS[metric], "number", False) for metric in _SHOWN),
    ("Gates held", "number", False),
    ("Trend", "", False),
    ("Data age", "text", True),
    ("Checked", "text", True),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One target of the site.

    Attributes:
        url: its page, relative to the index.
        history: its reports, oldest first; at least one.
    """

    url: str
    history: tuple[StoredReport, ...]

    @property
    def newest(self) -> StoredReport:
        """The report that the target is judged by."""
        return self.history[-1]


def render_index(entries: Sequence[Entry]) -> str:
    """The whole page; it needs no plotly."""
    verdicts = [verdict_word(entry.newest) for entry in entries]
    lights = "".join(
        f"<li>{verdict_badge(word, 'badge')} {count(verdicts.count(word), 'target')}</li>"
        for word in ("fail", "pass", "not judged")
        if word in verdicts
    )
    header = f"""<p class="brand"><b>kvtwin</b> fidelity of the digital twin</p>
<h1>Hardware targets</h1><ul class="lights">{lights}</ul>"""
    main = f"""<section aria-label="Targets">
{filter_form("targets", ("verdict", "hardware", "engine"), "name, model ...")}
<div class="panel scroll" tabindex="0" role="region" aria-label="Table of targets">
<table id="targets" class="sortable"><caption>Errors are simulated / measured &minus; 1 of the newest report, from the
smallest to the largest of its recorded runs; a column sorts by the largest in size. Data age: since the oldest
recording was made.</caption>
<thead><tr>{column_heads(_HEADS)}</tr></thead>
<tbody>
{"".join(_row(entry) for entry in entries)}</tbody></table></div>
</section>"""
    return render_page("Hardware targets", header, main, {})


def _row(entry: Entry) -> str:
    report = entry.newest
    verdict, facts = verdict_word(report), report.target
    found = headlines(report.checks)
    held, gates = gates_held(report.checks)
    name, model = text(title(report)), text(facts.get("model", ""))
    link = f'<a href="{text(entry.url)}">{name}</a><span class="soft">{model}</span>'
    columns = [
        f'<td class="text" data-value="{verdict}">{verdict_badge(verdict)}</td>',
        f'<th scope="row" class="text" data-value="{name}">{link}</th>',
        f'<td class="text wrap-text">{text(facts.get("hardware", ""))}</td>',
        f'<td class="text">{text(facts.get("engine", ""))}</td>',
        *(_metric_cell(found, metric) for metric in _SHOWN),
        number_cell(held / gates if gates else None, f"{held} of {gates}"),
        f"<td>{sparkline(entry.history)}</td>",
        _data_age(report),
        f'<td class="text date" data-value="{text(report.created or "")}">{_date(report)}</td>',
    ]
    data = {"verdict": verdict, "hardware": facts.get("hardware", ""), "engine": facts.get("engine", "")}
    attributes = " ".join(f'data-{key}="{text(value)}"' for key, value in data.items())
    return f"<tr {attributes}>{''.join(columns)}</tr>\n"


def _metric_cell(found: dict[str, Headline], metric: str) -> str:
    """The range over the runs, coloured by the hardest verdict; the largest size sorts."""
    if metric not in found:
        return '<td data-value="">&ndash;</td>'
    one = found[metric]
    hover = f"largest: {one.worst.run}; {limits(one)}; {one.verdict}"
    return (
        f'<td data-value="{abs(one.worst.error)!r}" title="{text(hover)}">'
        f'<span class="tone {verdict_class(one.verdict)}">{typeset(one.shown)}</span></td>'
    )


def _date(report: StoredReport) -> str:
    """The date; the script adds how long ago that is."""
    if report.created is None:
        return date_of(report)
    return dated(report.created, date_of(report)[:10], f"{date_of(report)} UTC")


def _data_age(report: StoredReport) -> str:
    """When the oldest recording was made."""
    day = recorded_on(report)
    if day is None:
        return '<td class="text date" data-value="" title="no recording says when it was made, nor does target.toml">unknown</td>'
    return f'<td class="text date" data-value="{day}">{dated(day, day, "day of the oldest recording")}</td>'
