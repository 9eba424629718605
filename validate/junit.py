"""JUnit XML of a report, so that a CI system shows each gate as a test case."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from kvtwin.traces.files import write_text
from kvtwin.validate.result import Check, Drift, TargetReport

# XML 1.0 has no way to write these characters, escaped or not.
_FORBIDDEN: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(*reports: TargetReport) -> str:
    """One test suite per target, one test case per check and per drift; without a gate it is a skipped test case.

    A gate that was not asked because the error lies within the noise floor counts as passed, and says so. A failure
    names the layers that attribution blames.
    """
    suites = ET.Element("testsuites", _counts(reports))
    for report in reports:
        name = report.target.get("name", "target")
        suite = ET.SubElement(suites, "testsuite", {"name": _text(name), **_counts([report])})
        properties = ET.SubElement(suite, "properties")
        for key, value in report.target.items():
            ET.SubElement(properties, "property", {"name": _text(key), "value": _text(value)})
        for check in report.checks:
            _case(suite, name, check, _blamed(report, check))
        for drift in report.drifts:
            _drift_case(suite, name, drift)
    ET.indent(suites, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def write(reports: Sequence[TargetReport], path: str | PathLike[str]) -> Path:
    """Write the JUnit XML, replacing an older file: all of it or nothing.

    Raises:
        InputError: the place cannot be written to.
    """
    return write_text(path, to_junit(*reports))


def _counts(reports: Sequence[TargetReport]) -> dict[str, str]:
    gates: list[tuple[str, float | None]] = []
    for report in reports:
        gates += [(check.verdict, check.threshold) for check in report.checks]
        gates += [(drift.verdict, drift.allowed) for drift in report.drifts]
    failures = sum(verdict == "fail" for verdict, _ in gates)
    skipped = sum(limit is None for _, limit in gates)
    return {"tests": str(len(gates)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}


def _blamed(report: TargetReport, check: Check) -> str:
    """Who is to blame for this error, or, where nobody is, for any of the run's; "" for nobody."""
    found = [one for one in report.attributions if one.run == check.run and one.blamed is not None]
    own = [one for one in found if one.metric == check.metric]
    return ", ".join(dict.fromkeys(str(one.blamed) for one in own or found))


def _drift_case(suite: ET.Element, target: str, drift: Drift) -> None:
    place = f"{target}.{drift.run}.drift"
    case = ET.SubElement(suite, "testcase", {"classname": _text(place), "name": _text(drift.metric), "time": "0"})
    then, now = ("none" if math.isnan(error) else f"{error:+.2%}" for error in (drift.before, drift.now))
    message = f"error {then} in the accepted report, {now} now"
    if drift.allowed is None:
        ET.SubElement(case, "skipped", {"message": _text(f"no gate: {drift.verdict}: {message}")})
    elif drift.verdict == "fail":
        headline = f"drift of {drift.metric} of {drift.run}: {message}, may grow by {drift.allowed:.2%}"
        ET.SubElement(case, "failure", {"type": "drift", "message": _text(headline)})
    else:
        ET.SubElement(case, "system-out").text = _text(f"{drift.verdict}: {message}")


def _case(suite: ET.Element, target: str, check: Check, blamed: str) -> None:
    place = f"{target}.{check.run}.{check.level}"
    case = ET.SubElement(suite, "testcase", {"classname": _text(place), "name": _text(check.metric), "time": "0"})
    if check.threshold is None:
        ET.SubElement(case, "skipped", {"message": _text(f"no gate: {_facts(check)}")})
    elif check.verdict == "fail":
        failure = ET.SubElement(case, "failure", {"type": "gate", "message": _text(_headline(check))})
        failure.text = _text("; ".join([_facts(check), *([f"blamed: {blamed}"] if blamed else [])]))
    else:
        ET.SubElement(case, "system-out").text = _text(f"{check.verdict}: {_facts(check)}")


def _headline(check: Check) -> str:
    return f"{check.metric} of {check.run}: {_error(check)}, at most {check.threshold:.2%} allowed"


def _error(check: Check) -> str:
    return "error could not be computed" if math.isnan(check.error) else f"error {check.error:+.2%}"


def _facts(check: Check) -> str:
    values = (("measured", check.measured), ("simulated", check.simulated))
    parts = [f"{word} {value:.6g} {check.unit}" for word, value in values if not math.isnan(value)]
    parts.append(_error(check))
    if check.interval is not None:
        parts.append(f"95 % interval {check.interval[0]:+.2%} to {check.interval[1]:+.2%}")
    if check.noise_floor is not None:
        parts.append(f"noise floor {check.noise_floor:.2%}")
    if check.threshold is not None:
        parts.append(f"threshold {check.threshold:.2%}")
    return "; ".join([*parts, f"n {check.n}", *([check.note] if check.note else [])])


def _text(text: str) -> str:
    """`text` with the characters that XML cannot carry replaced; ElementTree escapes the rest."""
    return _FORBIDDEN.sub("\ufffd", str(text))
