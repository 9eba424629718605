"""What a report says, in words: the cells of one check and the sentences about all of them.

Terminal, Markdown and HTML differ only in how they set these strings; none of them is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvtwin.reports.numbers import MISSING, count, number, percent, percent_interval
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.notes import loud_words
from kvtwin.validate.result import Check, Drift, TargetReport

AnyReport = TargetReport | StoredReport

_CLOCKS = {
    "queued_ns": "from the moment the engine's loop took the request in (the engine's clock)",
    "arrival_ns": "from the moment the client sent the request (the client's clock)",
}


@dataclass(frozen=True, slots=True)
class Cells:
    """One check as text, a string per column, in reading order."""

    run: str
    level: str
    metric: str
    measured: str
    simulated: str
    error: str
    interval: str
    noise_floor: str
    threshold: str
    verdict: str
    n: str
    note: str


def cells(check: Check) -> Cells:
    """The text of one check; a metric that is only an error (a MAPE) has no sign."""
    signed = not is_magnitude(check)
    return Cells(
        run=check.run,
        level=check.level,
        metric=check.metric,
        measured=_with_unit(check.measured, check.unit),
        simulated=_with_unit(check.simulated, check.unit),
        error=percent(check.error, signed=signed),
        interval=MISSING if check.interval is None else percent_interval(*check.interval, signed=signed),
        noise_floor=MISSING if check.noise_floor is None else percent(check.noise_floor, signed=False),
        threshold=MISSING if check.threshold is None else percent(check.threshold, signed=False),
        verdict=check.verdict,
        n=f"{check.n:,}",
        note=check.note,
    )


def is_magnitude(check: Check) -> bool:
    """Whether the check's error has no direction: nothing was measured beside it, as with a MAPE."""
    return math.isnan(check.measured) and math.isnan(check.simulated)


def title(report: AnyReport) -> str:
    """The target's name."""
    return report.target.get("name") or "unnamed target"


def verdict_word(report: AnyReport) -> str:
    """The verdict as shown: `pass`, `fail`, or `not judged` where no check has a gate."""
    return report.verdict if any(check.threshold is not None for check in report.checks) else "not judged"


def summary(report: AnyReport) -> str:
    """The outcome in one or two plain sentences."""
    gated = [check for check in report.checks if check.threshold is not None]
    runs = count(len({check.run for check in report.checks}), "recorded run")
    if not gated:
        text = f"No gate is set: {count(len(report.checks), 'check')} on {runs} reported, not judged."
    else:
        failed = [check for check in gated if check.verdict == "fail"]
        worst = max(failed or gated, key=_share_of_gate)
        outcome = (
            f"{len(failed)} of {count(len(gated), 'gate')} failed on {runs}"
            if failed
            else f"{'The only gate holds' if len(gated) == 1 else f'All {len(gated)} gates hold'} on {runs}"
        )
        text = f"{outcome}. {'Worst' if failed else 'Closest to its gate'}: {_gate_sentence(worst)}."
    within = sum(check.verdict == "not distinguishable" for check in report.checks)
    if within:
        text += f" {within} of {count(len(report.checks), 'check')} cannot be told from run-to-run noise."
    return text


def noise_floor_sentence(repeats: Sequence[str]) -> str:
    """Where the noise floor comes from; empty when the run was recorded only once."""
    if len(repeats) < 2:
        return ""
    names = ", ".join(repeats)
    return (
        f"Noise floor: this workload was recorded {len(repeats)} times ({names}); an error no larger than "
        "the difference among those recordings themselves is “not distinguishable” from a perfect simulation."
    )


def sentence_case(text: str) -> str:
    """A remark as a sentence begins; a name such as arrival_ns stays as it is written.

    >>> sentence_case("cache hits are as recorded"), sentence_case("arrival_ns lies early"), sentence_case("")
    ('Cache hits are as recorded', 'arrival_ns lies early', '')
    """
    first, _, _ = text.partition(" ")
    return text if "_" in first else text[:1].upper() + text[1:]


def clock_sentence(clock: Literal["queued_ns", "arrival_ns"]) -> str:
    """Which clock TTFT and latency start at."""
    return f"TTFT and latency count {_CLOCKS[clock]}."


def describe_drift(drift: Drift) -> str:
    """How one error changed since the accepted report."""
    then, now = ("none" if math.isnan(error) else percent(error, signed=True) for error in (drift.before, drift.now))
    parts = [f"error {then} in the accepted report, {now} now"]
    if drift.moved:
        parts.append(f"{drift.moved} moved")
    if drift.verdict not in ("new", "gone"):
        parts.append(f"since {drift.since}" if drift.since else "since this check")
    if drift.allowed is not None:
        parts.append(f"allowed to grow by {percent(drift.allowed, signed=False)}")
    return ", ".join(parts)


def describe_no_drift(history: Sequence[StoredReport]) -> str:
    """Why a check with a baseline lists no drift.

    Args:
        history: the baseline's reports of the target, oldest first.
    """
    if not history:
        return "the baseline holds no report of this target: no drift judged"
    of = f" of {history[0].created}" if history[0].created else ""
    return f"nothing drifted since the accepted report{of}: no error changed by more than half a point or its gate's max_drift"


def remarks(report: AnyReport) -> list[str]:
    """What nobody must miss: how the report came about, and what the notes of checks warn of."""
    told = report.provenance.get("remarks", [])
    return [*told, *dict.fromkeys(f"{check.run}: {word}" for check in report.checks for word in loud_words(check.note))]


def _share_of_gate(check: Check) -> float:
    """How much of its gate a check uses up; an error that is not a number is the worst of all."""
    if not math.isfinite(check.error):
        return math.inf
    threshold = check.threshold or 0.0
    if not check.error:
        return 0.0  # exact, as a gate of 0 asks for
    return abs(check.error) / threshold if threshold else math.inf


def _gate_sentence(check: Check) -> str:
    shown = cells(check)
    error = "no value" if shown.error == MISSING else f"an error of {shown.error}"
    return f"{check.metric} of {check.run} with {error} (gate {shown.threshold})"


def _with_unit(value: float, unit: str) -> str:
    text = number(value)
    return text if text == MISSING else f"{text} {unit}".rstrip()
