"""Against the last accepted report: what drifted, on which side, and since when.

    kvtwin check TARGET... --baseline OUT... -o NEW

The oldest of the baseline reports of a target is the accepted one; later ones are its history. An error drifts by how
much its size grew: |error now| - |error then|, in points of the measurement. A gate's `max_drift` makes it fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from kvtwin.validate import checks_json
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.gates import Gates, find_gate
from kvtwin.validate.result import Check, Drift

# Without a gate of its own an error drifts once its size has changed by this much: half a point.
NOTABLE: Final = 0.005
# A side has moved if its value differs by more than rounding.
_MOVED: Final = 1e-9


def read_history(outs: Sequence[Path]) -> dict[str, list[StoredReport]]:
    """Stored reports by the target's name, oldest first; those without a date stand first, as they were given.

    Raises:
        InputError: a folder holds no report, or one cannot be read.
    """
    found: dict[str, list[StoredReport]] = {}
    for path in (file for out in outs for file in checks_json.report_files(out)):
        report = checks_json.read(path)
        found.setdefault(report.target.get("name", ""), []).append(report)
    return {name: sorted(reports, key=lambda report: report.created or "") for name, reports in found.items()}


def find_drifts(checks: Sequence[Check], history: Sequence[StoredReport], gates: Gates) -> tuple[Drift, ...]:
    """What changed between the accepted report and these checks.

    Args:
        checks: of the check just made.
        history: earlier reports of the target, oldest (the accepted one) first; not empty.
        gates: `max_drift` of a metric's gate is what it may drift.

    Returns:
        One Drift per metric whose error changed by more than it may (or by `NOTABLE`), that is new, or that is gone.
    """
    past = [_by_name(report.checks) for report in history]
    accepted, now = past[0], _by_name(checks)
    drifts = []
    for key in dict.fromkeys([*now, *accepted]):
        gate = find_gate(key[1], gates)
        allowed = None if gate is None else gate.max_drift
        drift = _drift(key, accepted.get(key), now.get(key), allowed)
        if drift is None:
            continue
        limit = NOTABLE if allowed is None else allowed
        drifts.append(
            _dated(drift, [checks.get(key) for checks in past], [report.created for report in history], limit)
        )
    return tuple(drifts)


def _by_name(checks: Sequence[Check]) -> dict[tuple[str, str], Check]:
    return {(check.run, check.metric): check for check in checks}


def _drift(key: tuple[str, str], then: Check | None, now: Check | None, allowed: float | None) -> Drift | None:
    run, metric = key
    if then is None or now is None:
        error_then, error_now = (math.nan if check is None else check.error for check in (then, now))
        return Drift(run, metric, error_then, error_now, "", None, allowed, "new" if then is None else "gone")
    growth = _growth(then, now)
    if abs(growth) <= (NOTABLE if allowed is None else allowed):
        return None
    verdict: Literal["better", "worse", "fail"] = "better" if growth < 0 else "worse" if allowed is None else "fail"
    return Drift(run, metric, then.error, now.error, _moved(then, now), None, allowed, verdict)


def _growth(then: Check, now: Check) -> float:
    """How much the error's size grew; infinite where it can no longer be computed."""
    sizes = [math.inf if math.isnan(check.error) else abs(check.error) for check in (then, now)]
    return 0.0 if sizes[0] == sizes[1] else sizes[1] - sizes[0]


def _moved(then: Check, now: Check) -> str:
    sides: Mapping[str, tuple[float, float]] = {
        "measured": (then.measured, now.measured),
        "simulated": (then.simulated, now.simulated),
    }
    moved = [name for name, (one, two) in sides.items() if abs(one - two) > _MOVED * abs(one)]
    return " and ".join(moved)


def _dated(drift: Drift, past: Sequence[Check | None], dates: Sequence[str | None], limit: float) -> Drift:
    """With the date of the first report from which on every later one shows the drift."""
    if drift.verdict in ("new", "gone") or past[0] is None:
        return drift
    since = None
    for check, date in reversed(list(zip(past[1:], dates[1:], strict=True))):
        if check is None or abs(_growth(past[0], check)) <= limit:
            break
        since = date
    return replace(drift, since=since)
