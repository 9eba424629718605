"""Text, tables and JSON as HTML; whatever comes from outside is escaped here and nowhere else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtwin.reports.numbers import MISSING, number

MARKS = {"pass": "✓", "fail": "✗", "not distinguishable": "≈", "not judged": "○", "no gate": "○"}
_MINUS = "\N{MINUS SIGN}"
_NEGATIVE = re.compile(r"(?<![^ (])-(?=\d)")  # a word, or what stands in brackets, that begins so


@dataclass(frozen=True, slots=True)
class Table:
    """Plain texts in rows; the text alternative of a figure.

    Attributes:
        caption: what it holds.
        heads: a heading per column; the first column names the row.
        rows: as long as `heads`.
        compare: mark the rows whose last two texts differ.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    compare: bool = False


def text(value: str) -> str:
    """Escaped, also for attributes."""
    return html.escape(value, quote=True)


def typeset(value: str) -> str:
    """Escaped text whose numbers have a true minus sign and whose missing value is a dash."""
    if value == MISSING:
        return "&ndash;"
    return text(_NEGATIVE.sub(_MINUS, " ".join(value.split()))).replace(" %", "&nbsp;%")


def verdict_class(verdict: str) -> str:
    """The style of a verdict."""
    return f"is-{verdict.replace(' ', '-')}"


def verdict_badge(verdict: str, kind: str = "verdict") -> str:
    """A verdict as mark and word: never by colour alone."""
    return f'<span class="{kind} {verdict_class(verdict)}">{MARKS[verdict]} {verdict}</span>'


def folded_table(table: Table, summary: str = "Numbers") -> str:
    """A table that opens on demand."""
    return f'<details class="numbers"><summary>{text(summary)}</summary>{plain_table(table)}</details>'


def plain_table(table: Table) -> str:
    """A table that needs no script."""
    heads = "".join(f'<th scope="col">{typeset(head)}</th>' for head in table.heads)
    rows = "".join(_row(row, table.compare and row[-1] != row[-2]) for row in table.rows)
    label = text(table.caption)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(cells: Sequence[str], marked: bool) -> str:
    values = "".join(f"<td>{typeset(cell)}</td>" for cell in cells[1:])
    return f'<tr{" class=differs" if marked else ""}><th scope="row">{typeset(cells[0])}</th>{values}</tr>'


def records(value: Any) -> str:
    """Nested settings as nested definition lists; anything else as escaped text."""
    if isinstance(value, Mapping):
        pairs = (f"<dt>{text(str(key).replace('_', ' '))}</dt><dd>{records(item)}</dd>" for key, item in value.items())
        return f"<dl>{''.join(pairs)}</dl>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping) for item in value):
            return "".join(records(item) for item in value)
        return ", ".join(records(item) for item in value) or "&ndash;"
    if value is None:
        return "&ndash;"
    return typeset(number(value)) if isinstance(value, float) else text(str(value))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Short facts side by side: a name as text, and its value as markup."""
    items = "".join(f"<div><dt>{text(key)}</dt><dd>{value}</dd></div>" for key, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
