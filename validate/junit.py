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
from kvtwin.validate.result import Check, TargetReport

# XML 1.0 has no way to write these characters, escaped or not.
_FORBIDDEN: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(*reports: TargetReport) -> str:
    """One test suite per target, one test case per check; a check without a gate is a skipped test case.

    A gate that was not asked because the error lies within the noise floor counts as passed, and says so.
    """
    suites = ET.Element("testsuites", _counts([check for report in reports for check in report.checks]))
    for report in reports:
        name = report.target.get("name", "target")
        suite = ET.SubElement(suites, "testsuite", {"name": _text(name), **_counts(report.checks)})
        properties = ET.SubElement(suite, "properties")
        for key, value in report.target.items():
            ET.SubElement(properties, "property", {"name": _text(key), "value": _text(value)})
        for check in report.checks:
            _case(suite, name, check)
    ET.indent(suites, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def write(reports: Sequence[TargetReport], path: str | PathLike[str]) -> Path:
    """Write the JUnit XML, replacing an older file: all of it or nothing.

    Raises:
        InputError: the place cannot be written to.
    """
    return write_text(path, to_junit(*reports))


def _counts(checks: Sequence[Check]) -> dict[str, str]:
    failures = sum(check.verdict == "fail" for check in checks)
    skipped = sum(check.threshold is None for check in checks)
    return {"tests": str(len(checks)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}


def _case(suite: ET.Element, target: str, check: Check) -> None:
    place = f"{target}.{check.run}.{check.level}"
    case = ET.SubElement(suite, "testcase", {"classname": _text(place), "name": _text(check.metric), "time": "0"})
    if check.threshold is None:
        ET.SubElement(case, "skipped", {"message": _text(f"no gate: {_facts(check)}")})
    elif check.verdict == "fail":
        failure = ET.SubElement(case, "failure", {"type": "gate", "message": _text(_headline(check))})
        failure.text = _text(_facts(check))
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
