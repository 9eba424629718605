"""Against accepted reports: what drifted, which side moved, since when."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from kvtwin.traces.errors import InputError
from kvtwin.validate import checks_json
from kvtwin.validate.baseline import find_drifts, read_history
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.gates import parse_gates
from kvtwin.validate.result import Check, Drift, TargetReport

TTFT = Check("run", "e2e", "ttft_mean", "ms", 100.0, 102.0, 0.02, (0.01, 0.03), 300)
TPOT = Check("run", "e2e", "tpot_mean", "ms", 10.0, 9.9, -0.01, None, 300)


def stored(*checks: Check, created: str | None = None) -> StoredReport:
    return StoredReport("pass", {"name": "t"}, checks, {}, {}, {}, created)


def test_nothing_changed_is_no_drift() -> None:
    assert find_drifts([TTFT, TPOT], [stored(TTFT, TPOT)], {}) == ()


def test_a_larger_error_fails_its_gate_and_says_which_side_moved() -> None:
    now = replace(TTFT, simulated=105.0, error=0.05)
    gates = parse_gates({"ttft": {"max_error": 0.1, "max_drift": 0.02}})
    (drift,) = find_drifts([now, TPOT], [stored(TTFT, TPOT, created="2026-01-01T00:00:00Z")], gates)
    assert drift == Drift("run", "ttft_mean", 0.02, 0.05, "simulated", None, 0.02, "fail")
    (ungated,) = find_drifts([now, TPOT], [stored(TTFT, TPOT)], {})
    assert ungated.verdict == "worse"


def test_within_the_gate_is_no_drift_and_a_smaller_error_never_fails() -> None:
    gates = parse_gates({"ttft": {"max_error": 0.1, "max_drift": 0.02}})
    assert find_drifts([replace(TTFT, error=0.039)], [stored(TTFT)], gates) == ()
    (drift,) = find_drifts([replace(TTFT, error=-0.001)], [stored(replace(TTFT, error=0.05))], gates)
    assert drift.verdict == "better"


def test_the_size_counts_not_the_sign() -> None:
    assert find_drifts([replace(TTFT, error=-0.02)], [stored(TTFT)], {}) == ()


def test_since_when() -> None:
    dates = [f"2026-01-0{day}T00:00:00Z" for day in range(1, 6)]
    errors = [0.02, 0.06, 0.02, 0.05, 0.06]  # an excursion on day 2, drifted for good on day 4
    history = [stored(replace(TTFT, error=error), created=date) for error, date in zip(errors, dates, strict=True)]
    (drift,) = find_drifts([replace(TTFT, error=0.06)], history, {})
    assert drift.since == dates[3]


def test_new_gone_and_no_longer_computable() -> None:
    drifts = find_drifts([TTFT], [stored(TPOT)], {})
    assert [(drift.metric, drift.verdict) for drift in drifts] == [("ttft_mean", "new"), ("tpot_mean", "gone")]
    gates = parse_gates({"ttft": {"max_error": 0.1, "max_drift": 0.02}})
    (lost,) = find_drifts([replace(TTFT, error=math.nan)], [stored(TTFT)], gates)
    assert lost.verdict == "fail"


def test_history_is_read_by_target_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, epoch in (("b/one", 200), ("a", 100), ("b/two", 50)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(epoch))
        name = "other" if place == "b/two" else "t"
        checks_json.write(TargetReport({"name": name}, (TTFT,), ()), tmp_path / place / "checks.json")
    history = read_history([tmp_path / "b", tmp_path / "a"])
    assert [report.created for report in history["t"]] == ["1970-01-01T00:01:40Z", "1970-01-01T00:03:20Z"]
    assert len(history["other"]) == 1
    with pytest.raises(InputError, match="no such folder"):
        read_history([tmp_path / "b" / "one" / "nothing"])
