"""The page of one hardware target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtwin.reports.aggregate.document import Figures, RunFigures
from kvtwin.reports.causes import causes
from kvtwin.reports.numbers import MISSING, count, number, percent
from kvtwin.reports.pages.checks_table import checks_section
from kvtwin.reports.pages.figures.run import figures_of_run
from kvtwin.reports.pages.headline import METRICS, gates_held, headlines, limits
from kvtwin.reports.pages.markup import (
    Table,
    facts,
    plain_table,
    records,
    text,
    typeset,
    verdict_badge,
    verdict_class,
)
from kvtwin.reports.pages.plots import Figure, figure_html, specs_of
from kvtwin.reports.pages.schedules import schedule_html
from kvtwin.reports.pages.shell import contents_of, render_page
from kvtwin.reports.pages.trend import date_of, dated, recorded_on, trend_figure
from kvtwin.reports.pages.waterfall import waterfall_figure
from kvtwin.reports.peers import PeerTable, peer_tables
from kvtwin.reports.words import clock_sentence, noise_floor_sentence, summary, title, verdict_word
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.result import Drift

_FACTS = ("hardware", "model", "engine")
_RECORDS = ("profile", "provenance")
_DRIFTS = ("fail", "worse", "better", "gone", "new")  # what asks for attention first


def render_target(
    report: StoredReport,
    figures: Figures | None,
    history: Sequence[StoredReport] = (),
    *,
    index_url: str | None = None,
    plotly_url: str | None = None,
) -> str:
    """The whole page, from the two documents of a check alone.

    Args:
        report: checks.json.
        figures: figures.json; None where the check was made before there was one.
        history: all reports of the target, oldest first, this one included; empty: no trend is shown.
        index_url, plotly_url: the list of targets, and plotly.js, relative to the page; None: there is no list, and
            plotly.js is packed into the page.
    """
    drawn = {run.name: (run, _drawn(run, report)) for run in figures.runs} if figures else {}
    trend = [trend_figure(history)] if history else []
    specs = specs_of("all", trend)
    for index, name in enumerate(report.comparisons):
        specs |= specs_of(str(index), drawn[name][1]) if name in drawn else {}
    runs = [_run_section(index, name, report, drawn.get(name)) for index, name in enumerate(report.comparisons)]
    sections = [
        _cards(report),
        _causes(report),
        checks_section(report.checks),
        _drifts_section(report.drifts),
        f'<section aria-labelledby="runs"><h2 id="runs">Recorded runs</h2>{_run_picker(report)}{"".join(runs)}</section>',
        _trend_section(trend),
        _reproduce_section(report),
        *(_records_section(key, getattr(report, key)) for key in _RECORDS),
    ]
    links = {
        "checks": "Checks",
        **({"drifts": "Drift"} if report.drifts else {}),
        "runs": "Recorded runs",
        **({"trend": "Trend"} if trend else {}),
        "reproduce": "Reproduce",
    }
    links |= {key: key.capitalize() for key in _RECORDS if getattr(report, key)}
    return render_page(
        f"{title(report)}: {verdict_word(report)}",
        _header(report, index_url),
        "\n".join(section for section in sections if section),
        specs,
        contents=contents_of(links),
        plotly_url=plotly_url,
    )


def _drawn(run: RunFigures, report: StoredReport) -> list[Figure]:
    """The run's figures, the causes of its errors before its cache."""
    *figures, cache = figures_of_run(run)
    attributions = [found for found in report.attributions if found.run == run.name]
    checks = [check for check in report.checks if check.run == run.name]
    return [*figures, waterfall_figure(attributions, checks), cache]


def _header(report: StoredReport, index_url: str | None) -> str:
    back = f'<a href="{text(index_url)}">All targets</a> / ' if index_url else ""
    shown = [(key.capitalize(), text(report.target[key])) for key in _FACTS if report.target.get(key)]
    day = recorded_on(report)
    shown += [("Oldest recording", "unknown date" if day is None else dated(day, day))]
    shown += [("Checked", dated(report.created, f"{date_of(report)} UTC") if report.created else date_of(report))]
    shown.append(("Compared", f"{count(len(report.comparisons), 'run')}, {count(len(report.checks), 'check')}"))
    description = report.target.get("description", "")
    return f"""<p class="brand">{back}<b>kvtwin</b> fidelity report</p>
<h1>{text(title(report))}</h1>
{f'<p class="description">{text(description)}</p>' if description else ""}
<div class="lead">{verdict_badge(verdict_word(report), "badge")}
<p id="summary">{typeset(summary(report))}</p></div>
{facts(shown)}"""


def _cards(report: StoredReport) -> str:
    """The headline numbers."""
    cards = []
    for metric, found in headlines(report.checks).items():
        runs = f"over {count(len(found.checks), 'run')}, largest: {found.worst.run}" if len(found.checks) > 1 else ""
        cards.append(
            f'<li class="card {verdict_class(found.verdict)}"><span class="label">{METRICS[metric]}</span>'
            f'<b data-metric="{metric}">{typeset(found.shown)}</b><span>{typeset(limits(found))}</span><span>{text(runs)}</span></li>'
        )
    held, gates = gates_held(report.checks)
    verdict = verdict_class(verdict_word(report))
    cards.append(
        f'<li class="card {verdict}"><span class="label">Gates</span><b data-metric="gates">{held} of {gates}</b>'
        f"<span>{'hold' if gates else 'no gate is set'}</span></li>"
    )
    return f'<ul class="cards" aria-label="Headline errors">{"".join(cards)}</ul>'


def _causes(report: StoredReport) -> str:
    """Which layer causes errors, and what to look at; nothing where nobody is to blame."""
    lines = "".join(f"<li>{typeset(line)}</li>" for line in causes(report))
    if not lines:
        return ""
    return f"""<section class="panel causes" aria-labelledby="causes"><h2 id="causes">What the errors come from</h2>
<ul>{lines}</ul></section>"""


def _drifts_section(drifts: Sequence[Drift]) -> str:
    """What changed since the accepted report; nothing without a baseline."""
    if not drifts:
        return ""
    heads = ("check", "verdict", "accepted error", "error now", "what moved", "since", "may grow by")
    rows = [
        (
            f"{drift.metric} of {drift.run}",
            drift.verdict,
            percent(drift.before),
            percent(drift.now),
            drift.moved or MISSING,
            drift.since or (MISSING if drift.verdict in ("new", "gone") else "this check"),
            MISSING if drift.allowed is None else percent(drift.allowed, signed=False),
        )
        for drift in sorted(drifts, key=lambda drift: _DRIFTS.index(drift.verdict))
    ]
    table = plain_table(Table("Errors that changed since the accepted report", heads, rows))
    return f"""<section aria-labelledby="drifts"><h2 id="drifts">Against the accepted report</h2>
<div class="panel drifts">{table}</div></section>"""


def _run_picker(report: StoredReport) -> str:
    """Chooses one run; shown by the script where there are several."""
    options = "".join(f'<option value="{index}">{text(name)}</option>' for index, name in enumerate(report.comparisons))
    if len(report.comparisons) < 2:
        return ""
    return f"""<form class="filters picker" id="run-picker" aria-label="Which run to show" hidden><label>Recorded run
<select name="picked">{options}<option value="">all runs</option></select></label>
<button type="button" data-move="-1">Previous</button><button type="button" data-move="1">Next</button></form>"""


def _run_section(index: int, name: str, report: StoredReport, drawn: tuple[RunFigures, list[Figure]] | None) -> str:
    compared = report.comparisons[name]
    lead = [count(compared.num_requests, "request")]
    lead += [] if compared.num_steps is None else [count(compared.num_steps, "step")]
    if drawn is not None:
        lead += [f"{number(drawn[0].duration_s)} s recorded"] if drawn[0].duration_s else []
        lead += [_preemptions(*drawn[0].num_preemptions)] if any(drawn[0].num_preemptions) else []
    sentences = [noise_floor_sentence(compared.repeats), clock_sentence(compared.clock)]
    soft = f'<p class="soft">{text(" ".join([", ".join(lead) + ".", *filter(None, sentences)]))}</p>'
    if drawn is None:
        body = '<p class="soft">No figures: figures.json is missing. Make the report again with kvtwin check.</p>'
    else:
        body = "".join(figure_html(str(index), figure) for figure in drawn[1])
    schedule = schedule_html([found for found in report.schedules if found.run == name])
    peers = "".join(_peers(table) for table in peer_tables(report) if table.run == name)
    return f"""<section class="run" id="run-{index}" aria-labelledby="run-{index}-heading">
<h3 id="run-{index}-heading">{text(name)}</h3>
{soft}
<div class="grid">{body}{schedule}{peers}</div>
</section>
"""


def _peers(table: PeerTable) -> str:
    shown = plain_table(Table("The same recording, with our errors and theirs", table.heads, table.rows))
    notes = "".join(f'<p class="soft">{text(note)}</p>' for note in table.notes)
    return f'<div class="panel c12 peers"><h4>Other simulators</h4>{shown}{notes}</div>'


def _preemptions(measured: int | None, simulated: int | None) -> str:
    real, twin = ("unknown" if side is None else f"{side:,}" for side in (measured, simulated))
    return f"preemptions {real} measured and {twin} simulated"


def _trend_section(trend: Sequence[Figure]) -> str:
    if not trend:
        return ""
    shown = "".join(figure_html("all", figure, level=3) for figure in trend)
    return f'<section aria-labelledby="trend"><h2 id="trend">Trend</h2><div class="grid">{shown}</div></section>'


def _reproduce_section(report: StoredReport) -> str:
    """The command that made the report, as a user types it."""
    command = report.provenance.get("command")
    version = report.provenance.get("kvtwin")
    body = '<p class="soft">The command was not kept in this report.</p>'
    if isinstance(command, str):
        lines = [f"pip install kvtwin=={version}"] if isinstance(version, str) else []
        body = (
            f'<pre class="panel" tabindex="0"><code id="command">{text(chr(10).join([*lines, command]))}</code></pre>'
            '<p class="soft">The same target folder gives the same numbers; the digests of the recordings '
            "stand below, under Provenance.</p>"
        )
    return f'<section aria-labelledby="reproduce"><h2 id="reproduce">How to reproduce</h2>{body}</section>'


def _records_section(key: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    return f"""<section aria-labelledby="{key}"><h2 id="{key}">{key.capitalize()}</h2>
<details class="panel records"><summary>Show all</summary>{records(values)}</details></section>
"""
