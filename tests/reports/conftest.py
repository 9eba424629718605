"""Hand-made runs and reports: small enough to know every number."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kvtwin.reports.aggregate.build import aggregate
from kvtwin.reports.pages.target import render_target
from kvtwin.reports.site import write_site
from kvtwin.traces.files import write_text
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate import checks_json
from kvtwin.validate.checks_json import StoredReport
from kvtwin.validate.plain import from_plain
from kvtwin.validate.result import (
    PREDICTIONS,
    Attribution,
    Check,
    Comparison,
    Divergence,
    Drift,
    Part,
    Peer,
    ScheduleFinding,
    TargetReport,
)

from .browser import out_of

CHECKS = (
    Check("alpha", "e2e", "ttft_p90", "ms", 100.0, 91.4, -0.086, (-0.1, -0.07), 240, 0.02, 0.05, "fail"),
    Check("alpha", "e2e", "tpot_mean", "ms", 4.0, 4.04, 0.01, (-0.01, 0.03), 239, 0.02, 0.05, "not distinguishable"),
    Check(
        "alpha", "step", "step_mape", "%", math.nan, math.nan, 0.123, (0.12, 0.13), 7862, None, 0.2, "pass", "by step"
    ),
    Check("beta", "e2e", "throughput", "tokens/s", 12345.6, 12000.0, -0.028, None, 220),
)
PARTS = (Part("cache", -0.01), Part("schedule", 0.02), Part("step times", 0.085), Part("remainder", 0.005))
DIVERGENCE = Divergence(
    3,
    "order",
    {"batch": [["r0", 8, 1], ["r1", 0, 8]], "preempted": [], "num_waiting": 2, "num_free_blocks": 10},
    {"batch": [["r1", 0, 8], ["r0", 8, 1]], "preempted": ["r2"], "num_waiting": 2, "num_free_blocks": None},
    9,
)


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A run of `count` requests, one every 100 ms: queued at once, scheduled after 10 ms, done after 300 ms."""

    def make(count: int = 4, *, slow: float = 1.0, names: Sequence[str] | None = None, **columns: Any) -> Run:
        arrival = [index * 100 * NS_PER_MS for index in range(count)]
        given = {
            "request_id": names or [f"r{index}" for index in range(count)],
            "arrival_ns": arrival,
            "input_tokens": [8] * count,
            "output_tokens": [11] * count,
            "queued_ns": arrival,
            "scheduled_ns": [time + 10 * NS_PER_MS for time in arrival],
            "first_token_ns": [time + round(100 * slow * NS_PER_MS) for time in arrival],
            "finish_ns": [time + round(300 * slow * NS_PER_MS) for time in arrival],
        }
        table = from_columns("requests", {**given, **columns}, "hand-made")
        return Run(RunInfo("recorded"), {"requests": table})

    return make


def make_predictions(count: int, regimes: Sequence[str] = ("prefill", "decode", "mixed")) -> pa.Table:
    """Steps of 10, 11, 12 ... ms, each predicted 10 % too long; every seventh is extrapolated."""
    measured = [(10 + index) * NS_PER_MS for index in range(count)]
    columns: dict[str, list[Any]] = {
        "step": list(range(count)),
        "start_ns": [index * NS_PER_MS for index in range(count)],
        "measured_ns": measured,
        "predicted_ns": [time * 11 // 10 for time in measured],
        "regime": [regimes[index % len(regimes)] for index in range(count)],
        "num_reqs": [1] * count,
        "num_tokens": [1] * count,
        "context_tokens": [0] * count,
        "extrapolated": [index % 7 == 0 for index in range(count)],
    }
    return pa.table(columns, schema=PREDICTIONS)


@pytest.fixture
def predictions() -> Callable[..., pa.Table]:
    return make_predictions


def with_steps(run: Run, **columns: Any) -> Run:
    """Three steps: request 0 alone, then 0 and 1 (both finish), then 2; the engine is idle in between."""
    given = {
        "step": [0, 1, 2],
        "sched_ns": [0, 10, 40],
        "start_ns": [1, 11, 41],
        "end_ns": [8, 18, 48],
        "update_ns": [9, 19, 49],
        "request": [[0], [0, 1], [2]],
        "cache_len": [[0], [8, 0], [0]],
        "input_len": [[8], [1, 8], [8]],
        "finished": [[], [0, 1], [2]],
        "num_waiting": [2, 1, 0],
        "num_running": [1, 2, 1],
        "num_free_blocks": [9, 7, 10],
    }
    tables = {"requests": run.requests, "steps": from_columns("steps", {**given, **columns}, "hand-made")}
    return Run(RunInfo("recorded"), tables)


def stored(report: TargetReport) -> StoredReport:
    """The report as a reader of its checks.json has it, made at a fixed second."""
    document = {**checks_json.to_json(report), "created": "2026-11-20T10:00:00Z"}
    del document["schema_version"]
    found: StoredReport = from_plain(StoredReport, document, "checks.json")
    return found


@pytest.fixture
def comparison(make_run: Callable[..., Run]) -> Comparison:
    """Four requests, the simulated ones 10 % slower; 70 steps; recorded twice."""
    return Comparison("alpha", make_run(), make_run(slow=1.1), "queued_ns", make_predictions(70), ("alpha", "alpha_2"))


@pytest.fixture
def report(comparison: Comparison) -> TargetReport:
    """Two runs: one with everything, one recorded once and without steps."""
    return TargetReport(
        target={
            "name": "tiny",
            "hardware": "one core",
            "model": "m",
            "engine": "vllm 0.32.0",
            "description": "d",
            "recorded": "2026-04-25",
        },
        checks=CHECKS,
        comparisons=(comparison, replace(comparison, name="beta", predictions=None, repeats=())),
        schedules=(
            ScheduleFinding("alpha", 70, 68, DIVERGENCE, ("evicted blocks",)),
            ScheduleFinding("beta", 5, 5, None),
        ),
        attributions=(
            Attribution("alpha", "ttft_mean", "ms", 100.0, 110.0, PARTS, "step times", "one seed"),
            Attribution("alpha", "tpot_mean", "ms", 20.0, 22.0, (Part("cache", math.nan), Part("remainder", 0.1))),
        ),
        profile={"kind": "linear", "hold_out_mape": 0.083, "domain": {"num_reqs": [1, 64]}},
        provenance={"command": "kvtwin check tiny", "inputs": [{"path": "a.parquet"}], "seed": 0, "note": None},
    )


HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'`|<!--&[a](b)\x1b[31m\n"
    "]]>%{y}${window.hacked=1}\u2028window.hacked=1\u2029<a href='javascript:window.hacked=1'>\u202e"
)


@pytest.fixture
def hostile_report(make_run: Callable[..., Run]) -> TargetReport:
    """Markup and scripts in every string that a file or a user can set."""
    return report_of(HOSTILE, make_run)


@pytest.fixture
def harmless_report(make_run: Callable[..., Run]) -> TargetReport:
    """The same with a plain letter there: what the shape of a report must be."""
    return report_of("x", make_run)


def report_of(text: str, make_run: Callable[..., Run]) -> TargetReport:
    """A report that says `text` wherever it can."""
    run = with_steps(make_run(3, names=[text, f"{text}2", f"{text}3"], session_id=[text] * 3, cached_tokens=[1, 2, 3]))
    side = {"batch": [[text, 1, 2], text], text: text}
    steps = make_predictions(6, (text, "decode"))
    checks = tuple(replace(check, run=text, metric=text, unit=text, note=text) for check in CHECKS)
    return TargetReport(
        target=dict.fromkeys(("name", "hardware", "model", "engine", "description", "recorded", text), text),
        checks=checks,
        comparisons=(Comparison(text, run, run, "arrival_ns", steps, (text, text)),),
        schedules=(
            ScheduleFinding(text, 3, 1, Divergence(1, text, side, {"batch": text, text: [text]}, None), (text,)),
        ),
        attributions=(
            Attribution(text, text, text, 1.0, 1.1, (Part(text, 0.1), Part("<b>bold</b>", 0.0)), text, text),
            Attribution(text, "identical_steps", text, 3.0, 1.0, (Part("schedule", -0.7),), "schedule", text),
        ),
        drifts=(Drift(text, text, 0.1, math.nan, text, text, None, "gone"),),
        peers=(Peer(text, text, checks),),
        profile={text: text, "list": [text, {text: text}]},
        provenance={text: {text: text}},
    )


@pytest.fixture
def page(report: TargetReport, tmp_path: Path) -> Path:
    """The page that kvtwin check writes, plotly packed inside."""
    return write_text(tmp_path / "report.html", render_target(stored(report), aggregate(report)))


@pytest.fixture
def site(report: TargetReport, tmp_path: Path) -> Path:
    """Two targets, one of them with an older report in which every error was twice as large."""
    old = replace(report, checks=tuple(replace(check, error=2 * check.error) for check in report.checks))
    other = replace(report, target={**report.target, "name": "other", "engine": "sglang 0.5"}, checks=report.checks[1:])
    outs = [
        out_of(report, tmp_path / "new" / "tiny", "2026-11-20T10:00:00Z"),
        out_of(other, tmp_path / "new" / "other", "2026-11-20T10:00:00Z"),
        out_of(old, tmp_path / "old", "2026-10-01T10:00:00Z"),
    ]
    write_site([outs[2], tmp_path / "new"], tmp_path / "site")
    return tmp_path / "site"


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """One browser for this file; without one, the tests say what is missing."""
    browser = os.environ.get("KVTWIN_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
        "--force-prefers-reduced-motion",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(chromedriver))
    yield chrome
    chrome.quit()
