"""`kvtwin check` on a small target of known truth: what it says of one planted fault each, and without [gates]."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

TRUTH = (6_000_000, 25_000, 20, 10_000)
CONFIG = VllmConfig(num_gpu_blocks=200, max_num_seqs=8, max_num_batched_tokens=512)
HOST = HostTime(frontend_ns=55_000_000)
TIMES = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns")
Change = Callable[[pa.ChunkedArray], Any]


class Target:
    """A target whose recording was made by its twin; what a test changes makes the fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        columns = {
            "request_id": [f"r{row}" for row in range(60)],
            "arrival_ns": [100_000_000 + row * 41_000_000 for row in range(60)],
            "input_tokens": [300 + 37 * row % 400 for row in range(60)],
            "output_tokens": [5 + row % 11 for row in range(60)],
        }
        self.sent = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "made here")})
        made = simulate(self.sent, CONFIG, LinearLatency(*TRUTH), HOST)
        info = RunInfo("recorded", engine="vllm 0.32.0", engine_config=made.info.engine_config)
        self.recorded = Run(info, {"requests": made.requests, "steps": made.steps})
        self.slower, self.lines, self.runs = 1.0, ['profile = "profile.json"', 'run = "recorded"'], 0

    def check(self, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, checks.json and what was printed."""
        self.runs += 1
        place = self.folder / str(self.runs)
        place.mkdir()
        self.recorded.write(place / "recorded")
        self.sent.write(place / "sent")
        latency = LinearLatency(*(round(self.slower * price) for price in TRUTH))
        Profile(kind="linear", latency=latency.to_json(), host=HOST).write(place / "profile.json")
        (place / "target.toml").write_text("\n".join(['name = "small"', *self.lines]))
        capsys.readouterr()
        code = main(["check", str(place), "-o", str(place / "out"), *more])
        answer = capsys.readouterr()
        assert answer.err == ""
        return code, json.loads((place / "out" / "checks.json").read_text()), answer.out


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def changed(run: Run, names: tuple[str, ...], change: Change) -> Run:
    table = run.requests
    for name in names:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), change(table.column(name)))
    return Run(run.info, {"requests": table, **({"steps": run.steps} if run.has("steps") else {})})


def failed(document: dict[str, Any]) -> set[str]:
    return {check["metric"] for check in document["checks"] if check["verdict"] == "fail"}


def blamed(document: dict[str, Any]) -> set[str]:
    return {one["blamed"] for one in document["attributions"]} - {None}


def test_a_target_without_gates_is_judged_by_default_ones(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, text = target.check(capsys)
    assert (code, document["verdict"], blamed(document)) == (0, "pass", set())
    assert "note: target.toml has no [gates] table: kvtwin's default gates judge it" in text
    target.slower = 1.1
    code, document, _ = target.check(capsys)
    assert (code, blamed(document)) == (1, {"step times"})
    assert {"step_bias", "tpot_mean"} <= failed(document)
    target.lines.append("[gates]")  # an empty table asks for none
    code, document, text = target.check(capsys)
    assert (code, failed(document)) == (0, set())
    assert "not judged" in text


def test_a_budget_16_short_is_told_with_both_budgets(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    target.lines += ["[engine]", "max_num_batched_tokens = 496"]
    junit = target.folder / "junit.xml"
    code, document, text = target.check(capsys, "--junit", str(junit))
    assert (code, blamed(document)) == (1, {"schedule"})
    failures = [str(failure.text) for failure in ET.parse(junit).findall(".//failure")]
    assert failures and all(text.endswith("blamed: schedule") for text in failures)
    assert "identical_steps" in failed(document)
    assert "compare the engine settings" in text and "512 tokens recorded, 496 simulated" in text


@pytest.mark.parametrize("has_steps", [True, False], ids=["steps", "no-steps"])
def test_a_recording_in_another_unit_is_named(
    has_steps: bool, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    in_us = changed(target.recorded, TIMES, lambda column: pc.divide(column, 1000))
    target.recorded = in_us if has_steps else Run(in_us.info, {"requests": in_us.requests})
    target.lines.append('workload = "sent"')
    code, document, text = target.check(capsys)
    assert (code, blamed(document)) == (1, {"units"})
    assert "about 1/1000 of those of" in text
    steps = [check for check in document["checks"] if check["metric"] == "identical_steps"]
    assert [check["verdict"] for check in steps] == ["fail"] * has_steps  # such a log cannot be replayed


def test_an_arrival_clock_50_ms_off_is_told_in_ms(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    whole = target.recorded
    target.recorded = changed(whole, TIMES[:1], lambda column: pc.add(column, 50_000_000))
    code, document, text = target.check(capsys)
    assert (code, failed(document), blamed(document)) == (1, {"ttft_arrival"}, {"arrival"})
    assert "the way from arrival_ns to queued_ns takes 50.000 ms less than simulated" in text
    late = pa.array([0] * 30 + [50_000_000] * 30)
    target.recorded = changed(whole, TIMES[:1], lambda column: pc.add(column, late))
    code, document, text = target.check(capsys)
    assert (code, failed(document), blamed(document)) == (1, {"ttft_arrival"}, {"arrival"})
    found = re.search(r"takes 30 of 60 requests (\S+) ms less than the others", text)
    assert found is not None and abs(float(found[1]) - 50) < 7  # but for a turn of the loop


def test_a_workload_that_was_sent_at_other_times_is_told(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    whole = target.sent
    target.lines.append('workload = "sent"')
    target.sent = changed(whole, TIMES[:1], lambda column: pc.add(column, 50_000_000))
    code, document, text = target.check(capsys)
    assert (code, blamed(document)) == (0, set())  # perhaps but another origin of the clock
    assert "arrival_ns lies 50.000 ms before that of the workload, of all alike" in text
    late = pa.array([0] * 40 + [50_000_000] * 20)
    target.sent = changed(whole, TIMES[:1], lambda column: pc.add(column, late))
    target.lines += ["[gates]", "identical_arrivals = 0.0"]
    code, document, text = target.check(capsys)
    assert (code, failed(document), blamed(document)) == (1, {"identical_arrivals"}, {"arrival"})
    assert "20 of 60 requests were sent at other times" in text


def test_answers_that_end_before_the_workloads_limit_are_no_fault(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    target.lines.append('workload = "sent"')
    target.sent = changed(target.sent, ("output_tokens",), lambda column: pc.multiply(column, 2))
    code, document, _ = target.check(capsys)
    assert (code, failed(document)) == (0, set())


def test_a_baseline_without_drift_says_so(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    _, accepted, _ = target.check(capsys)
    out = str(target.folder / "1" / "out")
    _, document, text = target.check(capsys, "--baseline", out)
    line = f"nothing drifted since the accepted report of {accepted['created']}"
    assert text.count(line) == 1
    assert any(line in remark for remark in document["provenance"]["remarks"])
    assert "nothing drifted since" in (target.folder / "2" / "out" / "checks.md").read_text()
    target.slower = 1.1
    _, document, text = target.check(capsys, "--baseline", out)
    assert document["drifts"] and "nothing drifted" not in text
