"""Failed gates as GitHub annotations: lines that the runner shows on the pull request.

Format: `::error title=...,file=...::message` (GitHub, "Workflow commands for GitHub Actions").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvtwin.reports.words import cells, describe_drift, title
from kvtwin.validate.result import Drift, TargetReport

_SHOWN = 10  # GitHub shows ten errors and ten warnings of a step, and drops the rest silently


def annotate(report: TargetReport, path: Path) -> list[str]:
    """One line per failed gate, one per drift that no gate forbids; at most ten of each, the last one counts the rest.

    Args:
        report: what was found.
        path: the target's file, which the annotation points at.
    """
    name = title(report)
    lines = []
    for kind, found in (("error", failures(report)), ("warning", list(_drifts(report.drifts, "worse")))):
        shown = found if len(found) <= _SHOWN else found[: _SHOWN - 1]
        lines += [_line(kind, name, text, path) for text in shown]
        if len(found) > len(shown):
            lines.append(_line(kind, name, f"{len(found) - len(shown)} more: see the report", path))
    return lines


def failures(report: TargetReport) -> list[str]:
    """What makes the report fail, a line each; empty where it passes."""
    return [*_failed_checks(report), *_drifts(report.drifts, "fail")]


def _failed_checks(report: TargetReport) -> Iterator[str]:
    for check in report.checks:
        if check.verdict == "fail":
            shown = cells(check)
            measured = f"measured {shown.measured}, simulated {shown.simulated}: " if shown.measured else ""
            yield f"{check.metric} of {check.run}: {measured}error {shown.error}, allowed {shown.threshold}"


def _drifts(drifts: Sequence[Drift], verdict: str) -> Iterator[str]:
    for drift in drifts:
        if drift.verdict == verdict:
            yield f"{drift.metric} of {drift.run}: {describe_drift(drift)}"


def _line(kind: str, title_text: str, message: str, path: Path) -> str:
    return f"::{kind} title={_property(title_text)},file={_property(str(path))}::{_data(message)}"


def _data(text: str) -> str:
    """A message with the characters escaped that would end the command (actions/toolkit, command.ts, escapeData)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """The same for a property (escapeProperty)."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
