"""SGLang twins with one fault planted: a gate catches it, and the layer that it sits in is blamed.

The "recordings" are simulated, with 3 % of independent noise on every step, so the truth is known: the same server
without the fault.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtwin.sim.engines import simulate_engine
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.sglang.config import SglangConfig, sglang_config
from kvtwin.traces.run import Run
from kvtwin.validate.attribution.attribute import attribute
from kvtwin.validate.attribution.hybrids import Twin
from kvtwin.validate.e2e import compare_e2e
from kvtwin.validate.gates import parse_gates
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.scheduler.replay import replay_schedule
from kvtwin.validate.step import build_predictions, compare_steps

from .. import planted

GATES = parse_gates({"ttft_mean": 0.05, "latency_mean": 0.02, "step_bias": 0.02, "identical_steps": 0.0})
DEVICE = {
    "engine": "sglang",
    "max_total_tokens": 4096,
    "page_size": 16,
    "chunked_prefill_size": 512,
    "version": "0.5.9",
}
STORAGE = DEVICE | {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 2.0,
    "hicache_storage_backend": "file",
    "hicache_storage_prefetch_policy": "wait_complete",
    "hicache_storage_backend_extra_config": {"prefetch_threshold": 64},
    "hicache_links": {"query_base": 2_000_000, "read_base": 2_000_000, "read_per_page": 500_000},
}


def record(config: SglangConfig) -> Run:
    run = simulate_engine(planted.workload(11, 200), config, planted.Noisy(7, 0.03, 0.0))
    return Run(replace(run.info, kind="recorded"), {"requests": run.requests, "steps": run.steps})


def judge(
    recording: Run, config: SglangConfig, latency: LinearLatency = planted.TRUTH
) -> tuple[set[str], set[str | None]]:
    """Metrics whose gates fail, and whom attribution blames."""
    twin = Twin(recording, config, latency, HostTime(), simulate_engine(recording, config, latency))
    predicted = latency.step_ns(BatchStats.of_steps(recording.steps), 0)
    steps = compare_steps(build_predictions(recording.steps, predicted), name="x", gates=GATES)
    schedule, decisions = compare_schedulers(recording, replay_schedule(recording, config), name="x", gates=GATES)
    checks = [*steps, *decisions, *compare_e2e(recording, twin.run, name="x", clock="queued_ns", gates=GATES)]
    found = attribute(recording, twin, name="x", clock="queued_ns", checks=steps, schedule=schedule)
    for one in found:
        assert sum(part.change for part in one.parts) == pytest.approx(one.simulated / one.measured - 1, abs=1e-12)
    metrics = ("ttft_mean", "latency_mean", "step_bias", "identical_steps")
    blamed = {one.blamed for one in found if one.metric in metrics} - {None}
    return {check.metric for check in checks if check.verdict == "fail"}, blamed


@pytest.mark.parametrize("settings", [DEVICE, STORAGE])
def test_without_a_fault_gates_hold_and_nobody_is_blamed(settings: dict[str, object]) -> None:
    config = sglang_config(settings, "test")
    failed, blamed = judge(record(config), config)
    assert failed == set()
    assert blamed <= {"host"}


def test_step_times_a_tenth_too_long() -> None:
    config = sglang_config(DEVICE, "test")
    failed, blamed = judge(record(config), config, planted.slower(1.1))
    assert {"step_bias", "ttft_mean", "latency_mean"} <= failed
    assert blamed == {"step times"}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (DEVICE, {"radix_eviction_policy": "mru"}),  # lru in reverse
        (STORAGE, {"hicache_storage_prefetch_policy": "best_effort"}),
        (STORAGE, {"hicache_ratio": 1.2}),
    ],
    ids=["eviction-reversed", "prefetch-policy", "host-capacity"],
)
def test_a_cache_with_a_fault(settings: dict[str, object], fault: dict[str, object]) -> None:
    recording = record(sglang_config(settings, "test"))
    failed, blamed = judge(recording, sglang_config(settings | fault, "test"))
    assert "identical_steps" in failed
    assert "step_bias" not in failed
    assert blamed == {"cache and schedule"}  # SGLang's scheduler asks the cache while it forms a batch: one bar
