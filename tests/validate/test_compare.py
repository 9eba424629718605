"""Runs side by side: every number by hand, and what a run does not know stays unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.compare import SideBySide, compare_runs

MS = 1_000_000


def make(engine_config: dict[str, Any] | None = None, **columns: Any) -> Run:
    """Two requests of 100 and 300 prompt tokens, 1 s apart: TTFT 100 and 200 ms, ten more tokens in 100 ms each."""
    given: dict[str, Any] = {
        "request_id": ["a", "b"],
        "arrival_ns": [0, 1000 * MS],
        "input_tokens": [100, 300],
        "output_tokens": [11, 11],
        "first_token_ns": [100 * MS, 1200 * MS],
        "finish_ns": [200 * MS, 1300 * MS],
    }
    table = from_columns("requests", given | columns, "hand-made")
    return Run(RunInfo("simulated", engine="e 1", engine_config=engine_config or {}), {"requests": table})


CACHED: dict[str, Any] = {"cached_tokens": [64, 192], "cached_host_tokens": [0, 64], "cached_storage_tokens": [16, 32]}
QUEUES: dict[str, Any] = {
    "waiting_ns": [10 * MS, 30 * MS],
    "prefetch_ns": [0, MS],
    "running_ns": [90 * MS, 60 * MS],
    "swapped_ns": [0, 0],
}


def values(found: SideBySide, run: int = 0) -> dict[str, float]:
    return {metric.name: metric.values[run] for metric in found.metrics}


def test_the_numbers_of_one_run() -> None:
    found = values(compare_runs([make(**CACHED, **QUEUES, num_preemptions=[0, 2])], ["one"], "arrival_ns"))
    expected = {
        "ttft_mean": 150,
        "ttft_p50": 150,
        "ttft_p90": 190,
        "ttft_p99": 199,
        "tpot_mean": 10,
        "latency_mean": 250,
        "latency_p99": 299,
        "throughput": 22 / 1.3,
        "num_preemptions": 2,
        "cached_tokens": 256,
        "cached_device_tokens": 144,
        "cached_host_tokens": 64,
        "cached_storage_tokens": 48,
        "computed_tokens": 144,
        "hit_rate": 0.64,
        "waiting_mean": 20,
        "prefetch_mean": 0.5,
        "running_mean": 75,
        "swapped_mean": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_changes_are_against_the_first_run() -> None:
    fast = make(first_token_ns=[50 * MS, 1100 * MS], **CACHED)
    found = compare_runs([make(cached_tokens=[0, 0]), fast], ["slow", "fast"], "arrival_ns")
    assert found.metric("ttft_mean").changes == (0.0, -0.5)
    assert found.metric("tpot_mean").values[1] == pytest.approx(17.5)
    assert math.isnan(found.metric("cached_tokens").changes[1])  # from 0 there is no percentage
    assert found.notes == ()


def test_what_a_run_does_not_know_is_unknown() -> None:
    found = values(compare_runs([make(cached_tokens=[64, 192])], ["one"], "arrival_ns"))
    assert found["cached_tokens"] == 256
    assert found["computed_tokens"] == 144
    for name in ("cached_device_tokens", "cached_host_tokens", "num_preemptions", "waiting_mean", "swapped_mean"):
        assert math.isnan(found[name]), name
    single = compare_runs([make(output_tokens=[1, 1])], ["one"], "arrival_ns")
    assert math.isnan(values(single)["tpot_p99"])


def test_other_work_and_lost_requests_are_named() -> None:
    other = make(input_tokens=[100, 301])
    lost = make(finish_ns=[200 * MS, None])
    found = compare_runs([make(), other, lost], ["a", "b", "c"], "arrival_ns")
    assert found.notes == (
        "Not the requests of a, so the workload differs too: b.",
        "1 of 2 requests of c have no finish and are left out of it.",
    )
    assert found.metric("latency_mean").values == (250, 250, 200)


def test_settings_that_differ_are_shown_flat() -> None:
    one = make({"page_size": 64, "same": 1, "backend": ""})
    two = make({"page_size": 16, "same": 1, "backend": "file", "links": {"base": 5}})
    found = compare_runs([one, two], ["a", "b"], "arrival_ns")
    assert found.settings == {"page_size": ("64", "16"), "backend": ('""', "file"), "links.base": ("-", "5")}
    assert found.facts[1] == {"kind": "simulated", "engine": "e 1", "num_requests": 2}


@pytest.mark.parametrize(
    ("run", "names", "problem"),
    [
        (make(), ["a"], "a name of its own"),
        (make(), ["a", "a"], "a name of its own"),
        (make(first_token_ns=[None, None], finish_ns=[None, None]), ["a", "b"], "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(run: Run, names: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        compare_runs([make(), run], names, "arrival_ns")


def test_the_engine_s_clock_needs_its_queue() -> None:
    with pytest.raises(InputError, match="compare by the other clock"):
        compare_runs([make()], ["a"], "queued_ns")
    queued = make(queued_ns=[20 * MS, 1020 * MS])
    assert compare_runs([queued], ["a"], "queued_ns").metric("ttft_mean").values == (130,)
