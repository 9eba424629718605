"""checks.json and JUnit XML: what is written can be read back, whatever the names hold."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.traces.run import Run
from kvtwin.validate import checks_json, junit
from kvtwin.validate.result import (
    PREDICTIONS,
    Attribution,
    Check,
    Comparison,
    Divergence,
    Part,
    ScheduleFinding,
    TargetReport,
)

NAN = float("nan")
HOSTILE = "</x><script>alert('\"&]]>')</script>\n\t\x00\x1b[31m\ud800"

CHECKS = (
    Check("a", "e2e", "ttft_p90", "ms", 100.0, 91.4, -0.086, (-0.1, -0.07), 240, 0.02, 0.05, "fail", "slow"),
    Check("a", "e2e", "tpot_mean", "ms", 4.0, 4.04, 0.01, (-0.01, 0.03), 239, 0.02, 0.05, "not distinguishable"),
    Check("a", "step", "step_mape", "%", NAN, NAN, 0.123, (0.12, 0.13), 7862, None, 0.2, "pass", "by step"),
    Check("b", "e2e", "throughput", "tokens/s", 12345.6, 12000.0, -0.028, None, 220),
    Check("b", "e2e", "latency_p99", "ms", 10.0, NAN, NAN, None, 3, None, 0.1, "fail"),
)


@pytest.fixture
def report(make_run: Callable[..., Run]) -> TargetReport:
    run = make_run([1.0, 2.0], [3.0, 4.0])
    return TargetReport(
        {"name": "tiny", "hardware": "one core"},
        CHECKS,
        (
            Comparison("a", run, run, "queued_ns", PREDICTIONS.empty_table(), ("a", "a2")),
            Comparison("b", run, run, "arrival_ns"),
        ),
        {"mape": np.float64(0.1), "worst": math.inf, "n": np.int64(3), "domain": (1, 2)},
        {"inputs": [Path("a.parquet")], "seed": 0, "date": None},
    )


def same(one: Check, two: Check) -> bool:
    return repr(one) == repr(two)  # NaN equals itself there


def test_round_trip(report: TargetReport, tmp_path: Path) -> None:
    path = checks_json.write(report, tmp_path / "new" / "checks.json")
    stored = checks_json.read(path)
    assert all(same(one, two) for one, two in zip(stored.checks, CHECKS, strict=True))
    assert stored.verdict == "fail"
    assert stored.target == report.target
    assert stored.comparisons == {
        "a": checks_json.ComparedRun("queued_ns", ("a", "a2"), 2, 0),
        "b": checks_json.ComparedRun("arrival_ns", (), 2, None),
    }
    assert stored.profile == {"mape": 0.1, "worst": None, "n": 3, "domain": [1, 2]}
    assert stored.provenance == {"inputs": ["a.parquet"], "seed": 0, "date": None}
    assert [item.name for item in path.parent.iterdir()] == ["checks.json"]
    assert "NaN" not in path.read_text()


text = st.text(max_size=20)
number = st.floats(allow_infinity=False)
any_check = st.builds(
    Check,
    text, st.sampled_from(["step", "e2e"]), text, text, number, number, number,
    st.none() | st.tuples(number, number), st.integers(0), st.none() | st.floats(0, 1), st.none() | st.floats(0, 1),
    st.sampled_from(["pass", "fail", "not distinguishable", "no gate"]), text,
)  # fmt: skip


@given(st.lists(any_check, max_size=3), st.dictionaries(text, text, max_size=3))
def test_any_report_comes_back(
    tmp_path_factory: pytest.TempPathFactory, checks: list[Check], target: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "checks.json"
    report = TargetReport(target, tuple(checks), ())
    stored = checks_json.read(checks_json.write(report, path))
    assert [repr(check) for check in stored.checks] == [repr(check) for check in checks]
    assert stored.target == target
    assert stored.verdict == report.verdict


SCHEDULES = (
    ScheduleFinding("a", 10, 10, None, ("free blocks",)),
    ScheduleFinding("b", 9, 4, Divergence(4, "order", {"batch": [["r1", 0, 8]]}, {"batch": [], "free": None}, 7)),
)
ATTRIBUTIONS = (
    Attribution("a", "ttft_mean", "ms", 10.0, 11.0, (Part("cache", 0.02), Part("remainder", 0.08)), "cache", "n"),
    Attribution("b", "ttft_mean", "ms", 10.0, 11.0, ()),
)


def test_schedules_and_attributions_come_back(report: TargetReport, tmp_path: Path) -> None:
    full = replace(report, schedules=SCHEDULES, attributions=ATTRIBUTIONS)
    stored = checks_json.read(checks_json.write(full, tmp_path / "checks.json"))
    assert stored.schedules == SCHEDULES
    assert stored.attributions == ATTRIBUTIONS


def test_the_date_is_this_second_or_what_the_build_says(report: TargetReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    age = datetime.now(UTC) - datetime.fromisoformat(checks_json.to_json(report)["created"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert checks_json.to_json(report)["created"] == "2023-11-14T22:13:20Z"
    assert checks_json.to_json(report) == checks_json.to_json(report)
    for epoch in ("soon", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        with pytest.raises(InputError, match="not a number of seconds"):
            checks_json.to_json(report)


def test_an_older_file_has_no_date_and_no_causes(report: TargetReport, tmp_path: Path) -> None:
    document = checks_json.to_json(replace(report, schedules=SCHEDULES, attributions=ATTRIBUTIONS))
    for key in ("created", "schedules", "attributions"):
        del document[key]
    (tmp_path / "checks.json").write_text(json.dumps(document))
    stored = checks_json.read(tmp_path / "checks.json")
    assert (stored.created, stored.schedules, stored.attributions) == (None, (), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"created": "yesterday"}, "created: 'yesterday' is no date"),
        ({"schedules": [{}]}, "schedules[0]: keys are []"),
        ({"schedules": [asdict(SCHEDULES[0]) | {"not_judged": [1]}]}, "schedules[0].not_judged[0]: 1 is not a str"),
        ({"schedules": [asdict(SCHEDULES[0]) | {"first": {"step": 1}}]}, "schedules[0].first: keys are ['step']"),
        ({"attributions": [asdict(ATTRIBUTIONS[1]) | {"blamed": 3}]}, "attributions[0].blamed: 3 is not a str"),
        ({"attributions": [asdict(ATTRIBUTIONS[1]) | {"parts": [[]]}]}, "attributions[0].parts[0]: [] is not a dict"),
    ],
)
def test_bad_findings_get_one_line(report: TargetReport, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "checks.json"
    path.write_text(json.dumps(checks_json.to_json(report) | change))
    with pytest.raises(InputError) as error:
        checks_json.read(path)
    assert message in str(error.value)


def test_what_json_cannot_say_is_our_own_mistake(report: TargetReport) -> None:
    with pytest.raises(TypeError, match="set"):
        checks_json.to_json(replace(report, profile={"x": {1}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: is 2; this kvtwin reads 1: make it again with kvtwin check"),
        ({"verdict": "maybe"}, "verdict: 'maybe' is none of pass, fail"),
        ({"checks": {}}, "checks: {} is not a list"),
        ({"checks": [[]]}, "checks[0]: [] is not a dict"),
        ({"target": None}, "target: None is not a dict"),
    ],
)
def test_another_document_gets_one_line(
    report: TargetReport, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "checks.json"
    path.write_text(json.dumps(checks_json.to_json(report) | change))
    with pytest.raises(InputError) as error:
        checks_json.read(path)
    assert str(error.value) == f"{path}, {message}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n", True, "checks[0].n: True is not a int"),
        ("error", "0.1", "checks[0].error: '0.1' is not a number or null"),
        ("error", 10**400, "is not a number or null"),
        ("level", "fleet", "checks[0].level: 'fleet' is none of step, scheduler, cache, e2e"),
        ("verdict", "", "checks[0].verdict: '' is none of pass, fail, not distinguishable, no gate"),
        ("interval", [1], "checks[0].interval: [1] is not a list of 2"),
        ("noise_floor", False, "checks[0].noise_floor: False is not a number or null"),
        ("colour", 1, "checks[0]: keys are"),
    ],
)
def test_a_bad_check_gets_one_line(report: TargetReport, tmp_path: Path, key: str, value: Any, message: str) -> None:
    document = checks_json.to_json(report)
    document["checks"][0][key] = value
    path = tmp_path / "checks.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as error:
        checks_json.read(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"NaN", b"{}"])
def test_no_report_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checks.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checks\.json"):
        checks_json.read(path)


def test_a_missing_and_an_oversized_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not readable"):
        checks_json.read(tmp_path / "none.json")
    (tmp_path / "big.json").write_text("{ }")
    monkeypatch.setattr(checks_json, "MAX_BYTES", 2)
    with pytest.raises(InputError, match="3 bytes"):
        checks_json.read(tmp_path / "big.json")


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "file" / "checks.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new", "\ud800")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_junit_counts_and_cases(report: TargetReport, tmp_path: Path) -> None:
    root = ET.parse(junit.write([report], tmp_path / "junit.xml")).getroot()
    suite = root.find("testsuite")
    assert suite is not None
    assert {key: suite.get(key) for key in ("name", "tests", "failures", "errors", "skipped")} == {
        "name": "tiny", "tests": "5", "failures": "2", "errors": "0", "skipped": "1",
    }  # fmt: skip
    cases = suite.findall("testcase")
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        (f"tiny.{check.run}.{check.level}", check.metric) for check in CHECKS
    ]
    assert [case[0].tag for case in cases] == ["failure", "system-out", "system-out", "skipped", "failure"]
    assert cases[0][0].get("message") == "ttft_p90 of a: error -8.60%, at most 5.00% allowed"
    assert cases[0][0].text == (
        "measured 100 ms; simulated 91.4 ms; error -8.60%; 95 % interval -10.00% to -7.00%; noise floor 2.00%; "
        "threshold 5.00%; n 240; slow"
    )
    assert cases[1][0].text is not None
    assert cases[1][0].text.startswith("not distinguishable: measured 4 ms")
    assert cases[2][0].text is not None
    assert cases[2][0].text.startswith("pass: error +12.30%; 95 %")
    assert cases[4][0].get("message") == "latency_p99 of b: error could not be computed, at most 10.00% allowed"


def test_hostile_names_stay_text(report: TargetReport) -> None:
    checks = tuple(replace(check, run=HOSTILE, metric=HOSTILE, unit=HOSTILE, note=HOSTILE) for check in CHECKS)
    hostile = replace(report, target={"name": HOSTILE, HOSTILE: HOSTILE}, checks=checks)
    xml = junit.to_junit(hostile)
    assert "<script>" not in xml
    root = ET.fromstring(xml)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert [case.get("name") for case in root.iter("testcase")] == [shown] * len(CHECKS)
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped", "system-out",
    }  # fmt: skip
    assert checks_json.to_json(hostile)["checks"][0]["run"] == HOSTILE


@given(st.lists(any_check, max_size=3), text)
def test_any_report_is_well_formed_xml(checks: list[Check], name: str) -> None:
    root = ET.fromstring(junit.to_junit(TargetReport({"name": name}, tuple(checks), ())))
    assert len(list(root.iter("testcase"))) == len(checks)


def test_one_junit_file_holds_all_targets(tmp_path: Path) -> None:
    reports = [TargetReport({"name": name}, (), ()) for name in ("one", "other")]
    root = ET.parse(junit.write(reports, tmp_path / "junit.xml")).getroot()
    assert [suite.get("name") for suite in root.findall("testsuite")] == ["one", "other"]
