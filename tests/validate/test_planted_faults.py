"""A twin with one fault planted: a gate catches it, and attribution blames the layer it sits in.

The "recordings" are simulated, with 3 % of independent noise on every step, so the truth is known: the same engine
without the fault. (Our real CPU recordings are noisier, 20 to 27 %, and their noise hangs together.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kvtwin.sim.engines import simulate_engine
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.attribution import hybrids
from kvtwin.validate.attribution.attribute import attribute
from kvtwin.validate.attribution.hybrids import Twin
from kvtwin.validate.e2e import Clock, compare_e2e
from kvtwin.validate.gates import parse_gates
from kvtwin.validate.result import Attribution, Check
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.scheduler.replay import replay_schedule
from kvtwin.validate.step import build_predictions, compare_steps

from .. import planted

CONFIG = VllmConfig(
    num_gpu_blocks=900, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2048, async_scheduling=False
)
HOST = HostTime(schedule_ns=200_000, schedule_per_req_ns=4_000, update_ns=150_000, frontend_ns=2_000_000)
GATES = parse_gates({"ttft_mean": 0.05, "tpot_mean": 0.02, "latency_mean": 0.02, "step_mape": 0.06, "step_bias": 0.02})


def workload(seed: int, num_requests: int = 300) -> Run:
    """Poisson arrivals at about two thirds of what the engine can serve; prompts of 24 families share prefixes."""
    rng = np.random.default_rng(seed)
    family, num_tokens = rng.integers(0, 24, num_requests), rng.integers(4, 40, num_requests) * 16
    shared = np.minimum(num_tokens // 16, 20)
    hashes = [
        [1 + int(one) * 100 + block if block < common else 10_000 + row * 100 + block for block in range(total // 16)]
        for row, (one, common, total) in enumerate(zip(family, shared, num_tokens, strict=True))
    ]
    columns = {
        "request_id": [f"r{row}" for row in range(num_requests)],
        "arrival_ns": (np.cumsum(rng.exponential(0.055, num_requests)) * 1e9).astype(np.int64),
        "input_tokens": num_tokens,
        "output_tokens": rng.integers(4, 80, num_requests),
        "block_hashes": hashes,
    }
    return Run(RunInfo("workload", hash_block_tokens=16), {"requests": from_columns("requests", columns, "made here")})


def record(seed: int, config: VllmConfig = CONFIG) -> Run:
    run = simulate(workload(seed), config, planted.Noisy(seed, 0.03, 0.0), HOST)
    return Run(replace(run.info, kind="recorded"), {"requests": run.requests, "steps": run.steps})


def twin_of(
    recording: Run, *, config: VllmConfig = CONFIG, latency: LinearLatency = planted.TRUTH, host: HostTime = HOST
) -> Twin:
    return Twin(recording, config, latency, host, simulate(recording, config, latency, host))


def end_to_end(recording: Run, twin: Twin, clock: Clock = "queued_ns") -> list[Check]:
    return compare_e2e(recording, twin.run, name="x", clock=clock, gates=GATES)


def step_checks(recording: Run, latency: LinearLatency) -> list[Check]:
    predicted = latency.step_ns(BatchStats.of_steps(recording.steps), 0)
    return compare_steps(build_predictions(recording.steps, predicted), name="x", gates=GATES)


def failed(checks: list[Check]) -> set[str]:
    return {check.metric for check in checks if check.verdict == "fail"}


def blamed(recording: Run, twin: Twin, clock: Clock = "queued_ns") -> dict[str, str | None]:
    assert twin.latency is not None
    predicted = twin.latency.step_ns(BatchStats.of_steps(recording.steps), 0)
    checks = compare_steps(build_predictions(recording.steps, predicted), name="x")
    schedule, _ = compare_schedulers(recording, replay_schedule(recording, twin.config), name="x")
    found = attribute(recording, twin, name="x", clock=clock, checks=checks, schedule=schedule)
    for attribution in found:
        assert_adds_up(attribution)
    return {attribution.metric: attribution.blamed for attribution in found}


def waterfalls(found: list[Attribution]) -> list[Attribution]:
    """Those of end-to-end errors; the others are a layer's own measure."""
    return [one for one in found if len(one.parts) > 1]


def assert_adds_up(found: Attribution) -> None:
    error = found.simulated / found.measured - 1
    assert sum(part.change for part in found.parts) == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_fault_gates_hold(seed: int) -> None:
    recording = record(seed)
    twin = twin_of(recording)
    assert failed(end_to_end(recording, twin)) == set()
    assert failed(step_checks(recording, planted.TRUTH)) == set()
    assert set(blamed(recording, twin).values()) <= {None, "host"}  # the host is blamed for what is left over


def test_step_times_a_tenth_too_long() -> None:
    recording = record(1)
    slow = planted.slower(1.1)
    twin = twin_of(recording, latency=slow)
    checks = end_to_end(recording, twin)
    assert {"step_mape", "step_bias"} <= failed(step_checks(recording, slow))
    assert {"ttft_mean", "tpot_mean", "latency_mean"} <= failed(checks)
    found = blamed(recording, twin)
    assert {found[f"{time}_mean"] for time in ("ttft", "tpot", "latency")} == {"step times"}


def test_a_token_budget_16_short() -> None:
    recording = record(2)
    config = replace(CONFIG, max_num_batched_tokens=496)
    twin = twin_of(recording, config=config)
    gates = parse_gates({"identical_steps": 0.0})
    schedule, checks = compare_schedulers(recording, replay_schedule(recording, config), name="x", gates=gates)
    assert "identical_steps" in failed(checks)
    assert schedule.first is not None and schedule.first.what == "input_len"
    assert set(blamed(recording, twin).values()) - {None} == {"schedule"}  # nobody where the bar is too small to see


def test_eviction_in_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, num_gpu_blocks=420)
    recording = record(3, config)
    allocate = BlockPool.allocate

    def newest_first(pool: BlockPool, count: int) -> IntArray:
        """Take free blocks from the wrong end of the queue."""
        order = pool.free_order()
        for block in reversed(order):
            pool._free.move_to_end(block)
        return allocate(pool, count)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "allocate", newest_first)
        patch.setattr(hybrids, "simulate_engine", partial(simulate_engine, plain=True))  # the patched pool
        twin = Twin(
            recording, config, planted.TRUTH, HOST, simulate(recording, config, planted.TRUTH, HOST, plain=True)
        )
        found = blamed(recording, twin)
    hits = [int(pc.sum(run.requests.column("cached_tokens")).as_py()) for run in (recording, twin.run)]
    assert hits[1] < 0.9 * hits[0]
    assert "ttft_mean" in failed(end_to_end(recording, twin))
    assert found["ttft_mean"] == "cache"


def test_an_arrival_clock_50_ms_off() -> None:
    recording = record(4)
    table = recording.requests
    index = table.schema.get_field_index("arrival_ns")
    early = pc.subtract(table.column("arrival_ns"), 50_000_000)
    first = pc.min(early).as_py()
    shifted = table.set_column(index, "arrival_ns", pc.subtract(early, first))
    for name in ("queued_ns", "scheduled_ns", "first_token_ns", "finish_ns"):
        place = shifted.schema.get_field_index(name)
        shifted = shifted.set_column(place, name, pc.subtract(shifted.column(name), first))
    steps = recording.steps
    for name in ("sched_ns", "start_ns", "end_ns", "update_ns"):
        steps = steps.set_column(steps.schema.get_field_index(name), name, pc.subtract(steps.column(name), first))
    late = Run(recording.info, {"requests": shifted, "steps": steps})
    twin = twin_of(late)
    checks = end_to_end(late, twin, "arrival_ns")
    assert "ttft_mean" in failed(checks)
    found = blamed(late, twin, "arrival_ns")
    assert found["ttft_mean"] == found["ttft_p50"] == "arrival"


@pytest.mark.parametrize(("factor", "words"), [(1000, "1000x"), (1e-3, "1/1000 of")])
def test_units_taken_for_others_are_named(factor: float, words: str) -> None:
    recording = record(5)
    predicted = (factor * planted.TRUTH.step_ns(BatchStats.of_steps(recording.steps), 0)).astype(np.int64)
    checks = compare_steps(build_predictions(recording.steps, predicted), name="x", gates=GATES)
    assert "step_bias" in failed(checks)
    assert all(words in check.note for check in checks)


def test_a_recording_without_steps_leaves_one_bar_and_says_why() -> None:
    recording = record(6)
    alone = Run(recording.info, {"requests": recording.requests})
    for found in waterfalls(attribute(alone, twin_of(alone), name="x", clock="queued_ns")):
        assert [part.layer for part in found.parts][-1] == "step times, host, schedule"
        assert "no steps" in found.note
        assert_adds_up(found)


def test_without_call_times_an_engine_that_schedules_ahead_is_not_blamed_for_its_decisions() -> None:
    config = replace(CONFIG, async_scheduling=True)
    recording = record(8, config)
    index = recording.steps.schema.get_field_index("sched_ns")
    steps = recording.steps.set_column(index, "sched_ns", pa.nulls(recording.steps.num_rows, pa.int64()))
    unstamped = Run(recording.info, {"requests": recording.requests, "steps": steps})
    twin = twin_of(unstamped, config=config)
    assert set(blamed(unstamped, twin).values()) == {None}
    found = attribute(unstamped, twin, name="x", clock="queued_ns")[0]
    assert [part.layer for part in found.parts][-2:] == ["host and schedule", "remainder"]
    assert "sched_ns is not recorded" in found.note


def test_long_runs_are_looked_at_from_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(7)
    monkeypatch.setattr("kvtwin.validate.attribution.attribute.MAX_STEPS", 400)
    for found in waterfalls(attribute(recording, twin_of(recording), name="x", clock="queued_ns")):
        assert "of the first 400 steps" in found.note
        assert_adds_up(found)
