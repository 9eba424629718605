"""checks.json: what one `kvtwin check` of one target found, for programs. NaN is null, because JSON has no NaN."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.validate.plain import from_plain, load_object, to_plain
from kvtwin.validate.result import (
    CHECKS_SCHEMA_VERSION,
    Attribution,
    Check,
    Comparison,
    Drift,
    Peer,
    ScheduleFinding,
    TargetReport,
)

CHECKS_FILE: Final = "checks.json"
MAX_BYTES: Final = 64 * 1024 * 1024  # a report holds some hundreds of checks: more than this is another file
_DATE_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"  # one form only, so that dates sort as text


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """What checks.json keeps of a Comparison.

    Attributes:
        clock, repeats: as in Comparison.
        num_requests, num_steps: how many were compared; no steps where the recording has none.
    """

    clock: Literal["queued_ns", "arrival_ns"]
    repeats: tuple[str, ...]
    num_requests: int
    num_steps: int | None


@dataclass(frozen=True)
class StoredReport:
    """What checks.json keeps of a TargetReport: all but the runs themselves.

    Attributes:
        verdict: "pass" or "fail".
        target, checks, profile, provenance: as in TargetReport.
        comparisons: by name of the recorded run.
        created: when the check was made, UTC, as "2026-11-23T11:20:00Z"; None in files older than this key.
        schedules, attributions, drifts, peers: as in TargetReport; empty in files older than these keys.
    """

    verdict: Literal["pass", "fail"]
    target: Mapping[str, str]
    checks: tuple[Check, ...]
    comparisons: Mapping[str, ComparedRun]
    profile: Mapping[str, Any]
    provenance: Mapping[str, Any]
    created: str | None = None
    schedules: tuple[ScheduleFinding, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    drifts: tuple[Drift, ...] = ()
    peers: tuple[Peer, ...] = ()


def to_json(report: TargetReport) -> dict[str, Any]:
    """The report as one JSON document, dated now (or by SOURCE_DATE_EPOCH).

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
        TypeError: the profile or the provenance holds something that JSON cannot say.
    """
    document = {
        "schema_version": CHECKS_SCHEMA_VERSION,
        "created": report.created or now(),
        "verdict": report.verdict,
        "target": report.target,
        "checks": report.checks,
        "comparisons": {comparison.name: _compared(comparison) for comparison in report.comparisons},
        "profile": report.profile,
        "provenance": report.provenance,
        "schedules": report.schedules,
        "attributions": report.attributions,
        "drifts": report.drifts,
        "peers": report.peers,
    }
    plain: dict[str, Any] = to_plain(document)
    return plain


def write(report: TargetReport, path: str | PathLike[str]) -> Path:
    """Write checks.json, replacing an older one: all of it or nothing.

    Raises:
        InputError: the place cannot be written to.
    """
    return write_text(path, json.dumps(to_json(report), indent=1, allow_nan=False) + "\n")


def report_files(out: Path) -> list[Path]:
    """The checks.json files of an output folder of `kvtwin check`: its own, or those of its sub-folders.

    Raises:
        InputError: there is none.
    """
    if not out.is_dir():
        raise InputError("no such folder: give the output of kvtwin check", path=out)
    own = out / CHECKS_FILE
    found = [own] if own.is_file() else sorted(out.glob(f"*/{CHECKS_FILE}"))
    if not found:
        raise InputError(f"no {CHECKS_FILE} in it or in its sub-folders: give the output of kvtwin check", path=out)
    return found


def read(path: str | PathLike[str]) -> StoredReport:
    """Read checks.json back.

    Raises:
        InputError: not readable, of another schema version, or not a report.
    """
    document = load_object(Path(path), MAX_BYTES)
    version = document.get("schema_version")
    if version != CHECKS_SCHEMA_VERSION:
        problem = f"is {version!r}; this kvtwin reads {CHECKS_SCHEMA_VERSION}: make it again with kvtwin check"
        raise InputError(problem, path=path, column="schema_version")
    known = {field.name for field in fields(StoredReport)}
    parts = {key: value for key, value in document.items() if key in known}
    stored: StoredReport = from_plain(StoredReport, parts, path)
    if stored.created is not None:
        _check_date(stored.created, path)
    return stored


def _check_date(text: str, path: str | PathLike[str]) -> None:
    try:
        datetime.strptime(text, _DATE_FORMAT)
    except ValueError as error:
        raise InputError(f"{text!r} is no date such as 2026-11-23T11:20:00Z", path=path, column="created") from error


def now() -> str:
    """This second in UTC, or what SOURCE_DATE_EPOCH says it is (https://reproducible-builds.org/specs/)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(f"{epoch!r} is not a number of seconds since 1970", column="SOURCE_DATE_EPOCH") from error
    return moment.strftime(_DATE_FORMAT)


def _compared(comparison: Comparison) -> ComparedRun:
    num_steps = None if comparison.predictions is None else comparison.predictions.num_rows
    return ComparedRun(comparison.clock, comparison.repeats, comparison.measured.requests.num_rows, num_steps)
