"""The report as a table for people: aligned, no wider than the terminal, plain text when it is not one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from kvtwin.reports.causes import causes
from kvtwin.reports.peers import PeerTable, peer_tables
from kvtwin.reports.words import Cells, cells, describe_drift, remarks, summary, title, verdict_word
from kvtwin.validate.result import TargetReport

# Column heading, field of Cells, and how soon it may be left out when the terminal is narrow (0: never).
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("run", "run", 0),
    ("level", "level", 5),
    ("metric", "metric", 0),
    ("measured", "measured", 2),
    ("simulated", "simulated", 2),
    ("error", "error", 0),
    ("95 % interval", "interval", 4),
    ("noise floor", "noise_floor", 3),
    ("gate", "threshold", 1),
    ("verdict", "verdict", 0),
)
_LEFT_ALIGNED = {"run", "level", "metric", "verdict"}
_COLOURS = {"pass": "32", "fail": "31;1", "not distinguishable": "36", "not judged": "33", "no gate": "2"}
_GAP = "  "


def render_terminal(report: TargetReport, *, width: int = 120, colour: bool = False) -> str:
    """The table of checks and the summary.

    Args:
        report: what a check of one target found.
        width: columns of the terminal; the least important table columns are left out, and named, to fit.
        colour: colour the verdicts with ANSI escapes.
    """
    rows = [cells(check) for check in report.checks]
    columns = list(_COLUMNS)
    while _table_width(columns, rows) > width and any(rank for _, _, rank in columns):
        columns.remove(max(columns, key=lambda column: column[2]))
    left_out = [column[0] for column in _COLUMNS if column not in columns]
    lines = [f"{_plain(title(report))}: {_paint(verdict_word(report), colour)}", _plain(summary(report)), ""]
    lines += _table(columns, rows, colour) if rows else ["no checks"]
    if found := causes(report):
        lines += ["", "what the errors come from:", *(_plain(f"  {text}") for text in found)]
    for table in peer_tables(report):
        lines += ["", _plain(f"other simulators on {table.run}:"), *_peers(table)]
    if report.drifts:
        lines += ["", "since the accepted report:"]
        lines += [
            _plain(f"  {drift.metric} of {drift.run}: {drift.verdict}: {describe_drift(drift)}")
            for drift in report.drifts
        ]
    lines += ["", *(_plain(f"note: {text}") for text in told)] if (told := remarks(report)) else []
    lines += [f"(left out to fit {width} columns: {', '.join(left_out)})"] if left_out else []
    return "\n".join(lines) + "\n"


def print_report(report: TargetReport, stream: TextIO) -> None:
    """Write the table to `stream`: as wide as the terminal, all columns elsewhere; colour unless NO_COLOR is set."""
    is_terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else sys.maxsize
    stream.write(render_terminal(report, width=width, colour=is_terminal and not os.environ.get("NO_COLOR")))


def _peers(table: PeerTable) -> list[str]:
    rows = [[_plain(cell) for cell in row] for row in (table.heads, *table.rows)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(table.heads))]
    lines = ["  " + _GAP.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [*lines, *(f"  {_plain(note)}" for note in table.notes)]


def _column_widths(columns: Sequence[tuple[str, str, int]], rows: Sequence[Cells]) -> list[int]:
    return [max([len(head), *(len(_plain(getattr(row, key))) for row in rows)]) for head, key, _ in columns]


def _table_width(columns: Sequence[tuple[str, str, int]], rows: Sequence[Cells]) -> int:
    widths = _column_widths(columns, rows)
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _table(columns: Sequence[tuple[str, str, int]], rows: Sequence[Cells], colour: bool) -> list[str]:
    widths = _column_widths(columns, rows)
    lines = [_line([head for head, _, _ in columns], columns, widths), _GAP.join("-" * width for width in widths)]
    for row in rows:
        line = _line([_plain(getattr(row, key)) for _, key, _ in columns], columns, widths)
        if colour:  # the verdict is the last column: paint it after alignment, escapes have no width
            line = line[: len(line) - len(row.verdict)] + _paint(row.verdict, colour)
        lines.append(line)
    return lines


def _line(texts: Sequence[str], columns: Sequence[tuple[str, str, int]], widths: Sequence[int]) -> str:
    parts = [
        text.ljust(width) if key in _LEFT_ALIGNED else text.rjust(width)
        for text, (_, key, _), width in zip(texts, columns, widths, strict=True)
    ]
    return _GAP.join(parts).rstrip()


def _paint(verdict: str, colour: bool) -> str:
    return f"\x1b[{_COLOURS[verdict]}m{verdict}\x1b[0m" if colour else verdict


def _plain(text: str) -> str:
    """Text from a file cannot move the cursor: control characters become `?`, line ends a space."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
