"""The first step at which two schedulers part, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from kvtwin.reports.numbers import MISSING, count, number, percent
from kvtwin.reports.pages.markup import Table, plain_table, typeset
from kvtwin.validate.result import Divergence, ScheduleFinding

_MAX_MEMBERS = 24  # of a batch beside the other, around the first difference


def schedule_html(findings: Sequence[ScheduleFinding]) -> str:
    """How far the two schedulers agree, and where they first part, side by side."""
    if not findings:
        body = '<p class="soft">Not compared: no scheduler log of this run was replayed.</p>'
    else:
        body = "".join(_finding(found) for found in findings)
    return f'<div class="panel c8 schedule"><h4>Scheduler decisions, step by step</h4>{body}</div>'


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
    queues = (
        plain_table(Table("State at that step", ("state", "measured", "simulated"), rows, compare=True)) if rows else ""
    )
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
    caption = f"The batch: {count(len(measured), 'member')} measured, {len(simulated):,} simulated"
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
