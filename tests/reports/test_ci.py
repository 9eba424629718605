"""What a CI sees: annotations, the job's summary, drift against a baseline, targets as pytest tests."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import kvtwin.traces
from kvtwin.reports.annotations import annotate
from kvtwin.reports.cli import main
from kvtwin.validate.result import Check, Drift, TargetReport

pytest_plugins = ["pytester"]

DEMO = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny"
FAILED = Check("run", "e2e", "ttft_mean", "ms", 100.0, 110.0, 0.1, None, 300, None, 0.05, "fail")
GROWN = Drift("run", "tpot_p50", 0.01, 0.02, "simulated", None, None, "worse")


def small_target(folder: Path, gates: str) -> Path:
    """One recording of the bundled target."""
    runs = f'calibrate = ["{DEMO}/runs/sweep_1"]\nengine = "{DEMO}/engine.toml"\nrun = "{DEMO}/runs/saturated_1"\n'
    path = folder / "target.toml"
    path.write_text(f'name = "one: <run>"\n{runs}[gates]\n{gates}\n')
    return path


def test_annotations_name_file_metric_and_numbers() -> None:
    report = TargetReport({"name": "a,b: c"}, (FAILED,), (), drifts=(GROWN,))
    place = "title=a%2Cb%3A c,file=t/target.toml"
    error, warning = annotate(report, Path("t/target.toml"))
    assert error.startswith(f"::error {place}::ttft_mean of run: measured 100")
    assert error.endswith("error +10.0 %25, allowed 5.00 %25")
    assert warning.startswith(f"::warning {place}::tpot_p50 of run: error +1.00 %25 in the accepted report")
    assert warning.endswith("simulated moved, since this check")


def test_github_shows_ten_annotations_so_the_tenth_counts_the_rest() -> None:
    checks = tuple(replace(FAILED, metric=f"m{index}") for index in range(15))
    lines = annotate(TargetReport({"name": "t"}, checks, ()), Path("t"))
    assert len(lines) == 10
    assert lines[-1].endswith("::6 more: see the report")


def test_a_name_cannot_end_the_command() -> None:
    (line,) = annotate(TargetReport({"name": "x\n::error::y"}, (replace(FAILED, run="r\n::set-env"),), ()), Path("t"))
    assert "\n" not in line


def test_check_with_baseline_on_github(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    target = small_target(tmp_path, "tpot_mean = { max_error = 1.0, max_drift = 0.0 }\nttft_p50 = 0.0001")
    assert main(["check", str(target), "-o", str(tmp_path / "first")]) == 1  # ttft_p50
    stored = json.loads((tmp_path / "first" / "checks.json").read_text())
    row = next(check for check in stored["checks"] if check["metric"] == "tpot_mean")
    row["error"] = 0.0
    (tmp_path / "first" / "checks.json").write_text(json.dumps(stored))
    capsys.readouterr()
    code = main(["check", str(target), "-o", str(tmp_path / "next"), "--baseline", str(tmp_path / "first")])
    assert code == 1
    shown = capsys.readouterr()
    assert (
        "::error" in shown.err and "ttft_p50" in shown.err and "tpot_mean of saturated_1: error 0.00 %25" in shown.err
    )
    assert "tpot_mean of saturated_1: fail: error 0.00 % in the accepted report" in shown.out
    summary = (tmp_path / "summary.md").read_text()
    assert "Since the accepted report" in summary and "ttft\\_p50" in summary
    failures = ET.parse(tmp_path / "next" / "junit.xml").findall(".//failure")
    assert [failure.get("type") for failure in failures] == ["gate", "drift"]
    assert "drift of tpot_mean of saturated_1: error +0.00% in the accepted report" in str(failures[1].get("message"))
    drifts = json.loads((tmp_path / "next" / "checks.json").read_text())["drifts"]
    assert [(drift["metric"], drift["verdict"]) for drift in drifts] == [("tpot_mean", "fail")]


def test_a_baseline_without_the_target_is_said_and_a_missing_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    target = small_target(tmp_path, "tpot_mean = 1.0")
    assert main(["check", str(target), "-o", str(tmp_path / "a"), "--baseline", str(other)]) == 2
    assert "no checks.json in it" in capsys.readouterr().err
    assert main(["check", str(target), "-o", str(tmp_path / "b")]) == 0
    report = json.loads((tmp_path / "b" / "checks.json").read_text())
    report["target"]["name"] = "another"
    (other / "checks.json").write_text(json.dumps(report))
    assert main(["check", str(target), "-o", str(tmp_path / "c"), "--baseline", str(other)]) == 0
    remarks = json.loads((tmp_path / "c" / "checks.json").read_text())["provenance"]["remarks"]
    assert any("no drift judged" in remark for remark in remarks)


def test_targets_as_pytest_tests(pytester: pytest.Pytester, tmp_path: Path) -> None:
    good = small_target(tmp_path, "tpot_mean = 1.0")
    (tmp_path / "bad").mkdir()
    bad = small_target(tmp_path / "bad", "ttft_p50 = 0.0001")
    pytester.makepyfile(
        f"""
        def test_good(kvtwin_target):
            report = kvtwin_target({str(good)!r})
            assert report is kvtwin_target({str(good)!r})

        def test_bad(kvtwin_target):
            kvtwin_target({str(bad)!r})

        def test_missing(kvtwin_target):
            kvtwin_target("nowhere")

        def test_verdict_only(kvtwin_target):
            assert kvtwin_target({str(bad)!r}, fail=False).verdict == "fail"
        """
    )
    result = pytester.runpytest_subprocess("--kvtwin-output", str(tmp_path / "kept"), "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["*ttft_p50 of saturated_1*allowed 0.01 %*"])
    result.stdout.fnmatch_lines(["*kvtwin: nowhere*"])
    assert "Traceback" not in result.stdout.str()
    assert len(list((tmp_path / "kept").glob("*/report.html"))) == 2
