"""Two runs with requests of their own: what differs is found, what does not is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtwin.traces
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.gates import parse_gates
from kvtwin.validate.unpaired import compare_unpaired

RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"


def run_of(ttft_ms: np.ndarray, tpot_ms: np.ndarray, first: int = 0) -> Run:
    arrival = np.arange(len(ttft_ms)) * 100_000_000
    first_token = arrival + (ttft_ms * 1e6).astype(np.int64)
    columns = {
        "request_id": [f"r{first + row}" for row in range(len(ttft_ms))],
        "arrival_ns": arrival,
        "input_tokens": np.full(len(arrival), 10),
        "output_tokens": np.full(len(arrival), 11),
        "queued_ns": arrival,
        "first_token_ns": first_token,
        "finish_ns": first_token + (tpot_ms * 10e6).astype(np.int64),
    }
    return Run(RunInfo(kind="recorded"), {"requests": from_columns("requests", columns, "test")})


def test_a_slower_version_under_other_traffic_is_found_and_gated() -> None:
    rng = np.random.default_rng(0)
    before = run_of(rng.lognormal(3, 0.3, 400), rng.lognormal(2, 0.1, 400))
    after = run_of(rng.lognormal(3, 0.3, 300), 1.2 * rng.lognormal(2, 0.1, 300), first=1000)
    checks = compare_unpaired(
        before, after, name="x", clock="queued_ns", gates=parse_gates({"tpot": 0.05, "ttft": 0.05})
    )
    verdicts = {check.metric: check.verdict for check in checks}
    assert {verdicts[f"tpot_{name}"] for name in ("mean", "p50", "p90")} == {"fail"}
    assert {verdicts[f"ttft_{name}"] for name in ("mean", "p50", "p90", "p99")} == {"not distinguishable"}
    tpot = next(check for check in checks if check.metric == "tpot_mean")
    assert tpot.interval is not None and tpot.interval[0] < 0.2 < tpot.interval[1]
    assert tpot.n == 300


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir() if "sweep" not in path.name))
def test_every_other_request_of_a_recording_is_like_the_rest(name: str) -> None:
    run = read_run(RUNS / name)
    rows = np.arange(run.requests.num_rows)
    halves = [Run(RunInfo(kind="recorded"), {"requests": run.requests.take(rows[part::2])}) for part in (0, 1)]
    checks = compare_unpaired(*halves, name=name, clock="queued_ns")
    # Nominal: 5 % false alarms. Requests in turn meet the same queue, so fewer: 0 of 120 on these ten recordings.
    assert [check.metric for check in checks if check.verdict != "not distinguishable"] == []


def test_a_queue_that_grows_is_no_false_alarm() -> None:
    # Requests of the saturated recording all come at once: the later half waits, and that is so. Of the TTFT, which
    # does nothing but grow in either half, there is no more than one independent piece of evidence in each.
    run = read_run(RUNS / "saturated_1")
    half = run.requests.num_rows // 2
    halves = [Run(RunInfo(kind="recorded"), {"requests": run.requests.slice(at, half)}) for at in (0, half)]
    checks = {check.metric: check for check in compare_unpaired(*halves, name="x", clock="queued_ns")}
    assert checks["latency_mean"].verdict == "no gate" and checks["latency_mean"].error > 1
    assert checks["ttft_mean"].error > 1 and "may be too narrow" in checks["ttft_mean"].note


def test_a_run_without_times_is_refused() -> None:
    columns = {"request_id": ["a"], "arrival_ns": [0], "queued_ns": [0], "input_tokens": [1], "output_tokens": [1]}
    empty = Run(RunInfo(kind="recorded"), {"requests": from_columns("requests", columns, "test")})
    with pytest.raises(InputError, match="nothing to compare"):
        compare_unpaired(empty, empty, name="x", clock="queued_ns")
