"""Hand-made runs and reports: small enough to know every number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.result import PREDICTIONS, Check, Comparison, TargetReport

CHECKS = (
    Check("alpha", "e2e", "ttft_p90", "ms", 100.0, 91.4, -0.086, (-0.1, -0.07), 240, 0.02, 0.05, "fail"),
    Check("alpha", "e2e", "tpot_mean", "ms", 4.0, 4.04, 0.01, (-0.01, 0.03), 239, 0.02, 0.05, "not distinguishable"),
    Check(
        "alpha", "step", "step_mape", "%", math.nan, math.nan, 0.123, (0.12, 0.13), 7862, None, 0.2, "pass", "by step"
    ),
    Check("beta", "e2e", "throughput", "tokens/s", 12345.6, 12000.0, -0.028, None, 220),
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


@pytest.fixture
def comparison(make_run: Callable[..., Run]) -> Comparison:
    """Four requests, the simulated ones 10 % slower; 70 steps; recorded twice."""
    return Comparison("alpha", make_run(), make_run(slow=1.1), "queued_ns", make_predictions(70), ("alpha", "alpha_2"))


@pytest.fixture
def report(comparison: Comparison) -> TargetReport:
    """Two runs: one with everything, one recorded once and without steps."""
    return TargetReport(
        target={"name": "tiny", "hardware": "one core", "model": "m", "engine": "vllm 0.32.0", "description": "d"},
        checks=CHECKS,
        comparisons=(comparison, replace(comparison, name="beta", predictions=None, repeats=())),
        profile={"kind": "linear", "hold_out_mape": 0.083, "domain": {"num_reqs": [1, 64]}},
        provenance={"command": "kvtwin check tiny", "inputs": [{"path": "a.parquet"}], "seed": 0, "note": None},
    )


HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'`|<!--&[a](b)\x1b[31m\n"


@pytest.fixture
def hostile_report(make_run: Callable[..., Run]) -> TargetReport:
    """Markup and scripts in every string that a file or a user can set."""
    text = HOSTILE
    run = make_run(2, names=[text, f"{text}2"], session_id=[text, text])
    steps = make_predictions(6, (text, "decode"))
    checks = tuple(replace(check, run=text, metric=text, unit=text, note=text) for check in CHECKS)
    return TargetReport(
        target=dict.fromkeys(("name", "hardware", "model", "engine", "description", text), text),
        checks=checks,
        comparisons=(Comparison(text, run, run, "arrival_ns", steps, (text, text)),),
        profile={text: text, "list": [text, {text: text}]},
        provenance={text: {text: text}},
    )
