"""checks.json: what one `kvtwin check` of one target found, for programs. NaN is null, because JSON has no NaN."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.validate.result import (
    CHECKS_SCHEMA_VERSION,
    Attribution,
    Check,
    Comparison,
    Divergence,
    Level,
    Part,
    ScheduleFinding,
    TargetReport,
    Verdict,
)

T = TypeVar("T")
Where = str | PathLike[str]
Reader = Callable[[Any, str, Where], T]  # (value, its place in the document, the file) -> what it says

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
        created: when the check was made, UTC, as "2026-11-23T11:20:00Z"; None in files older than this key.
        schedules, attributions: as in TargetReport; empty in files older than these keys.
    """

    verdict: str
    target: Mapping[str, str]
    checks: tuple[Check, ...]
    comparisons: Mapping[str, Mapping[str, Any]]
    profile: Mapping[str, Any]
    provenance: Mapping[str, Any]
    created: str | None = None
    schedules: tuple[ScheduleFinding, ...] = ()
    attributions: tuple[Attribution, ...] = ()


def to_json(report: TargetReport) -> dict[str, Any]:
    """The report as one JSON document, dated now (or by SOURCE_DATE_EPOCH).

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
        TypeError: the profile or the provenance holds something that JSON cannot say.
    """
    document = {
        "schema_version": CHECKS_SCHEMA_VERSION,
        "created": _now(),
        "verdict": report.verdict,
        "target": report.target,
        "checks": [asdict(check) for check in report.checks],
        "comparisons": {comparison.name: _comparison(comparison) for comparison in report.comparisons},
        "profile": report.profile,
        "provenance": report.provenance,
        "schedules": [asdict(finding) for finding in report.schedules],
        "attributions": [asdict(attribution) for attribution in report.attributions],
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
    return StoredReport(
        verdict,
        checks=_rows(document.get("checks"), _check, "checks", path),
        **parts,
        created=_optional(document.get("created"), _date, "created", path),
        schedules=_rows(document.get("schedules", []), _schedule, "schedules", path),
        attributions=_rows(document.get("attributions", []), _attribution, "attributions", path),
    )


def _now() -> str:
    """This second in UTC, or what SOURCE_DATE_EPOCH says it is (https://reproducible-builds.org/specs/)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(f"{epoch!r} is not a number of seconds since 1970", column="SOURCE_DATE_EPOCH") from error
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


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


def _expect(value: Any, kind: type, column: str, path: Where) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{_cut(value)} is not a {kind.__name__}", path=path, column=column)
    return value


def _rows(value: Any, read_row: Reader[T], column: str, path: Where) -> tuple[T, ...]:
    rows = _expect(value, list, column, path)
    return tuple(read_row(row, f"{column}[{index}]", path) for index, row in enumerate(rows))


def _optional(value: Any, read_value: Reader[T], column: str, path: Where) -> T | None:
    return None if value is None else read_value(value, column, path)


def _fields_of(row: Any, kind: type, place: str, path: Where) -> dict[str, Any]:
    """The row as a dict that has the fields of the dataclass `kind`, no more and no fewer."""
    found: dict[str, Any] = _expect(row, dict, place, path)
    known = {field.name for field in fields(kind)}
    if set(found) != known:
        problem = f"keys are {_cut(sorted(found))}; expected {', '.join(sorted(known))}"
        raise InputError(problem, path=path, column=place)
    return found


def _check(row: Any, place: str, path: Where) -> Check:
    row = _fields_of(row, Check, place, path)
    texts: dict[str, Any] = {key: _text(row[key], f"{place}.{key}", path) for key in _TEXTS}
    for key, allowed in (("level", get_args(Level)), ("verdict", get_args(Verdict))):
        if texts[key] not in allowed:
            raise InputError(f"{texts[key]!r} is none of {', '.join(allowed)}", path=path, column=f"{place}.{key}")
    numbers = {key: _number(row[key], f"{place}.{key}", path, absent=math.nan) for key in _NUMBERS}
    limits = {key: _number(row[key], f"{place}.{key}", path, absent=None) for key in _OPTIONAL}
    interval = _interval(row["interval"], f"{place}.interval", path)
    return Check(**texts, **numbers, **limits, interval=interval, n=_int(row["n"], f"{place}.n", path))


def _schedule(row: Any, place: str, path: Where) -> ScheduleFinding:
    row = _fields_of(row, ScheduleFinding, place, path)
    return ScheduleFinding(
        run=_text(row["run"], f"{place}.run", path),
        num_steps=_int(row["num_steps"], f"{place}.num_steps", path),
        num_identical=_int(row["num_identical"], f"{place}.num_identical", path),
        first=_optional(row["first"], _divergence, f"{place}.first", path),
        not_judged=_rows(row["not_judged"], _text, f"{place}.not_judged", path),
    )


def _divergence(row: Any, place: str, path: Where) -> Divergence:
    row = _fields_of(row, Divergence, place, path)
    return Divergence(
        step=_int(row["step"], f"{place}.step", path),
        what=_text(row["what"], f"{place}.what", path),
        measured=_expect(row["measured"], dict, f"{place}.measured", path),
        simulated=_expect(row["simulated"], dict, f"{place}.simulated", path),
        resync_step=_optional(row["resync_step"], _int, f"{place}.resync_step", path),
    )


def _attribution(row: Any, place: str, path: Where) -> Attribution:
    row = _fields_of(row, Attribution, place, path)
    texts: dict[str, Any] = {key: _text(row[key], f"{place}.{key}", path) for key in ("run", "metric", "unit", "note")}
    numbers = {key: _number(row[key], f"{place}.{key}", path, absent=math.nan) for key in ("measured", "simulated")}
    return Attribution(
        **texts,
        **numbers,
        parts=_rows(row["parts"], _part, f"{place}.parts", path),
        blamed=_optional(row["blamed"], _text, f"{place}.blamed", path),
    )


def _part(row: Any, place: str, path: Where) -> Part:
    row = _fields_of(row, Part, place, path)
    change = _number(row["change"], f"{place}.change", path, absent=math.nan)
    return Part(_text(row["layer"], f"{place}.layer", path), change)


def _text(value: Any, column: str, path: Where) -> str:
    text: str = _expect(value, str, column, path)
    return text


def _date(value: Any, column: str, path: Where) -> str:
    try:
        datetime.fromisoformat(_text(value, column, path))
    except ValueError as error:
        raise InputError(f"{_cut(value)} is no date such as 2026-11-23T11:20:00Z", path=path, column=column) from error
    return str(value)


def _int(value: Any, column: str, path: Where) -> int:
    number: int = _expect(value, int, column, path)
    return number


def _number(value: Any, column: str, path: Where, absent: float | None) -> Any:
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{_cut(value)} is not a number or null", path=path, column=column)
    return float(value)


def _interval(value: Any, column: str, path: Where) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{_cut(value)} is not [low, high] or null", path=path, column=column)
    low, high = (_number(end, column, path, absent=math.nan) for end in value)
    return (low, high)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
