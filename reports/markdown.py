"""The report as GitHub-flavoured Markdown, for a CI summary or a pull-request comment."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from kvtwin.reports.causes import causes
from kvtwin.reports.peers import PeerTable, peer_tables
from kvtwin.reports.words import cells, describe_drift, noise_floor_sentence, remarks, summary, title, verdict_word
from kvtwin.validate.result import Check, Drift, TargetReport

_HEADINGS = ("run", "level", "metric", "measured", "simulated", "error", "95 % interval", "noise floor", "gate")
_MARKS = {"pass": "✅", "fail": "❌", "not distinguishable": "≈", "not judged": "⚪", "no gate": "⚪"}


def render_markdown(report: TargetReport) -> str:
    """The verdict, the summary, and the table of checks; every text from outside is escaped."""
    verdict = verdict_word(report)
    lines = [f"## {_MARKS[verdict]} {verdict}: {escape(title(report))}", "", escape(summary(report)), ""]
    if report.checks:
        lines.append(f"| {' | '.join(_HEADINGS)} | verdict |")
        lines.append("|---|---|---|" + "---:|" * (len(_HEADINGS) - 3) + "---|")
        lines += [_row(check) for check in report.checks]
        lines.append("")
    if found := causes(report):
        lines += ["**What the errors come from**", "", *(f"- {escape(text)}" for text in found), ""]
    for table in peer_tables(report):
        lines += [f"**Other simulators on {escape(table.run)}**", "", *_peers(table), ""]
    if report.drifts:
        lines += ["**Since the accepted report**", "", *(_drift_line(drift) for drift in report.drifts), ""]
    floors = dict.fromkeys(noise_floor_sentence(comparison.repeats) for comparison in report.comparisons)
    lines += [f"- {escape(text)}" for text in (*floors, *remarks(report)) if text]
    return "\n".join([*lines, *_notes(report.checks)]).rstrip("\n") + "\n"


def _peers(table: PeerTable) -> list[str]:
    rule = "|---|" + "---:|" * (len(table.heads) - 1)
    head, *rows = (f"| {' | '.join(escape(cell) for cell in row)} |" for row in (table.heads, *table.rows))
    return [head, rule, *rows, *(line for note in table.notes for line in ("", escape(note)))]


def _drift_line(drift: Drift) -> str:
    text = f"{drift.metric} of {drift.run}: {drift.verdict}: {describe_drift(drift)}"
    return f"- {_MARKS['fail'] if drift.verdict == 'fail' else _MARKS['no gate']} {escape(text)}"


def escape(text: str) -> str:
    """Make a text inert in a Markdown table cell: no markup, no HTML, no new cell, no new line.

    >>> escape("a|b <i>*c*</i>")
    'a\\\\|b &lt;i&gt;\\\\*c\\\\*&lt;/i&gt;'
    """
    flat = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", flat)


def _notes(checks: Sequence[Check]) -> list[str]:
    """The notes of all checks, folded away; each once, with the metrics that it is about."""
    about: dict[str, list[str]] = {}
    for check in checks:
        if check.note:
            about.setdefault(check.note, []).append(f"{check.metric} of {check.run}")
    if not about:
        return []
    lines = [f"- {escape(note)}: {escape(', '.join(metrics))}" for note, metrics in about.items()]
    return ["", "<details><summary>Notes on the checks</summary>", "", *lines, "", "</details>"]


def _row(check: Check) -> str:
    shown = cells(check)
    texts = [shown.run, shown.level, shown.metric, shown.measured, shown.simulated, shown.error]
    texts += [shown.interval, shown.noise_floor, shown.threshold]
    return f"| {' | '.join(escape(text) for text in texts)} | {_MARKS[check.verdict]} {check.verdict} |"
