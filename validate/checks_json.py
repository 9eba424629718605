"""checks.json: what one `kvtwin check` of one target found, for programs. NaN is null, because JSON has no NaN."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.validate.result import CHECKS_SCHEMA_VERSION, Check, Comparison, Level, TargetReport, Verdict

MAX_BYTES: Final = 64 * 1024 * 1024  # a report holds some hundreds of checks: more than this is another file

_TEXTS: Final = ("run", "level", "metric", "unit", "verdict", "note")
_NUMBERS: Final = ("measured", "simulated", "error")  # null stands for NaN
_OPTIONAL: Final = ("noise_floor", "threshold")  # null stands for None


@dataclass(frozen=True)
class StoredReport:
    """What checks.json keeps of a TargetReport: all but the runs themselves.

    Attributes:
        verdict: "pass" or "fail".
        target, checks, profile, provenance: as in TargetReport.
        comparisons: by name of the recorded run: its clock, its repeats, how many requests and steps were compared.
    """

    verdict: str
    target: Mapping[str, str]
    checks: tuple[Check, ...]
    comparisons: Mapping[str, Mapping[str, Any]]
    profile: Mapping[str, Any]
    provenance: Mapping[str, Any]


def to_json(report: TargetReport) -> dict[str, Any]:
    """The report as one JSON document.

    Raises:
        TypeError: the profile or the provenance holds something that JSON cannot say.
    """
    document = {
        "schema_version": CHECKS_SCHEMA_VERSION,
        "verdict": report.verdict,
        "target": report.target,
        "checks": [asdict(check) for check in report.checks],
        "comparisons": {comparison.name: _comparison(comparison) for comparison in report.comparisons},
        "profile": report.profile,
        "provenance": report.provenance,
    }
    plain: dict[str, Any] = _plain(document)
    return plain


def write(report: TargetReport, path: str | PathLike[str]) -> Path:
    """Write checks.json, replacing an older one: all of it or nothing.

    Raises:
        InputError: the place cannot be written to.
    """
    return write_text(path, json.dumps(to_json(report), indent=1, allow_nan=False) + "\n")


def read(path: str | PathLike[str]) -> StoredReport:
    """Read checks.json back.

    Raises:
        InputError: not readable, of another schema version, or not a report.
    """
    document = _load(Path(path))
    version = document.get("schema_version")
    if version != CHECKS_SCHEMA_VERSION:
        problem = f"is {version!r}; this kvtwin reads {CHECKS_SCHEMA_VERSION}: make it again with kvtwin check"
        raise InputError(problem, path=path, column="schema_version")
    parts = {
        key: _expect(document.get(key), dict, key, path) for key in ("target", "comparisons", "profile", "provenance")
    }
    verdict = document.get("verdict")
    if verdict not in ("pass", "fail"):
        raise InputError(f"is {verdict!r}; expected pass or fail", path=path, column="verdict")
    rows = _expect(document.get("checks"), list, "checks", path)
    checks = tuple(_check(row, f"checks[{index}]", path) for index, row in enumerate(rows))
    return StoredReport(verdict, checks=checks, **parts)


def _comparison(comparison: Comparison) -> dict[str, Any]:
    predictions = comparison.predictions
    return {
        "clock": comparison.clock,
        "repeats": comparison.repeats,
        "num_requests": comparison.measured.requests.num_rows,
        "num_steps": None if predictions is None else predictions.num_rows,
    }


def _plain(value: Any) -> Any:
    """Only what JSON has: tuples become lists, numpy scalars numbers, paths strings, NaN and infinities null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} has no place in checks.json")


def _load(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{size} bytes: checks.json has at most {MAX_BYTES}", path=path)
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"not readable ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON ({error})", path=path) from error
    if not isinstance(document, dict):
        raise InputError("expected a JSON object", path=path)
    return document


def _expect(value: Any, kind: type, column: str, path: str | PathLike[str]) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{_cut(value)} is not a {kind.__name__}", path=path, column=column)
    return value


def _check(row: Any, place: str, path: str | PathLike[str]) -> Check:
    row = _expect(row, dict, place, path)
    known = {field.name for field in fields(Check)}
    if set(row) != known:
        problem = f"keys are {_cut(sorted(row))}; expected {', '.join(sorted(known))}"
        raise InputError(problem, path=path, column=place)
    texts = {key: _expect(row[key], str, f"{place}.{key}", path) for key in _TEXTS}
    for key, allowed in (("level", get_args(Level)), ("verdict", get_args(Verdict))):
        if texts[key] not in allowed:
            raise InputError(f"{texts[key]!r} is none of {', '.join(allowed)}", path=path, column=f"{place}.{key}")
    numbers = {key: _number(row[key], f"{place}.{key}", path, absent=math.nan) for key in _NUMBERS}
    limits = {key: _number(row[key], f"{place}.{key}", path, absent=None) for key in _OPTIONAL}
    interval = _interval(row["interval"], f"{place}.interval", path)
    return Check(**texts, **numbers, **limits, interval=interval, n=_expect(row["n"], int, f"{place}.n", path))


def _number(value: Any, column: str, path: str | PathLike[str], absent: float | None) -> Any:
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{_cut(value)} is not a number or null", path=path, column=column)
    return float(value)


def _interval(value: Any, column: str, path: str | PathLike[str]) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{_cut(value)} is not [low, high] or null", path=path, column=column)
    low, high = (_number(end, column, path, absent=math.nan) for end in value)
    return (low, high)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
