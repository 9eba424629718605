"""Invariants of every simulated run, over random workloads and engines (numbered; see also `check_invariants`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.vllm.array_pool import ArrayPool
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.engine import Engine
from kvtwin.sim.vllm.simulate import build_requests, simulate
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

sys.path.insert(0, str(Path(__file__).parent))
from workloads import configs, workloads  # type: ignore[import-not-found]  # beside this file

LATENCY = LinearLatency(1_000_000, 20_000, 50, 10_000)
# Priced with every member's share: the longest context, pairs of a chunk, a kink in the tokens.
REGRESSION = RegressionLatency(
    {
        "step": 1e6 + 0.37,
        "num_tokens": 2.1e4,
        "decode_context": 51.3,
        "decode_context_max": 77.7,
        "prefill_pairs": 3.3,
        "tokens_over_64": 1234.5,
    }
)
MODELS: st.SearchStrategy[LatencyModel] = st.sampled_from([LATENCY, REGRESSION])
# KVTWIN_EXAMPLES=5000 for a longer search.
MANY = int(os.environ.get("KVTWIN_EXAMPLES", "400"))
HOSTS = st.sampled_from(
    [
        HostTime(),
        HostTime(gap_ns=50_000),
        HostTime(200_000, 10_000, 100_000, 5_000, 30_000),
        HostTime(schedule_ns=3_000_000, update_ns=1_000_000),  # slower than the device
    ]
)


def run_or_stuck(workload: Run, config: VllmConfig, host: HostTime) -> Run | None:
    """None where the real engine would not get on either: a watermark never met, preemptions that undo one another."""
    try:
        return simulate(workload, config, LATENCY, host)
    except KvtwinError as error:
        assert "never be scheduled" in str(error) or "undo one another" in str(error)
        return None


@settings(max_examples=300)
@given(st.data())
def test_every_run_obeys_the_invariants(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    run = run_or_stuck(workload, config, data.draw(HOSTS))
    if run is not None:
        check_requests(run, workload)
        check_steps(run, config)


def check_requests(run: Run, workload: Run) -> None:
    """INV-1 every request is served in full; INV-2 its times are in order; INV-3 a hit leaves a token to compute."""
    table = {name: run.requests.column(name).to_numpy() for name in run.requests.column_names if name.endswith("_ns")}
    for before, after in (
        ("arrival_ns", "queued_ns"),
        ("queued_ns", "scheduled_ns"),
        ("scheduled_ns", "first_token_ns"),
        ("first_token_ns", "finish_ns"),
    ):
        assert np.all(table[before] <= table[after]), (before, after)
    cached, inputs = (run.requests.column(name).to_numpy() for name in ("cached_tokens", "input_tokens"))
    assert np.all((cached >= 0) & (cached < inputs))
    assert run.requests.select(["request_id", "arrival_ns"]).equals(
        workload.requests.select(["request_id", "arrival_ns"])
    )


def check_steps(run: Run, config: VllmConfig) -> None:
    """INV-4 the clock is monotone; INV-5 no step exceeds a limit; INV-6 tokens computed add up."""
    steps = run.steps
    start, end = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    assert np.all(start < end)
    assert np.all(end[:-1] <= start[1:])
    lengths = pa.compute.list_value_length(steps.column("request")).to_numpy()
    tokens = np.array([sum(values) for values in steps.column("input_len").to_pylist()])
    assert np.all((lengths >= 1) & (lengths <= config.max_num_seqs))
    assert np.all(tokens <= config.max_num_batched_tokens)
    assert np.all(steps.column("num_running").to_numpy() <= config.max_num_seqs)
    free = steps.column("num_free_blocks").to_numpy()
    assert np.all((free >= 0) & (free < config.num_gpu_blocks))
    check_token_counts(run)


def check_token_counts(run: Run) -> None:
    """Each request's chunks follow on one another from its hit, or from a new start after a preemption.

    A call that preempts and schedules nothing is no step (ENGINES_VLLM.md, "A rule for both versions"): its
    preemptions show in the counts alone.
    """
    reached: dict[int, int] = {}
    unlogged = run.requests.column("num_preemptions").to_pylist()
    columns = (run.steps.column(name).to_pylist() for name in ("request", "cache_len", "input_len", "preempted"))
    for members, cache_lens, input_lens, preempted in zip(*columns, strict=True):
        for row in preempted:
            unlogged[row] -= 1
            reached.pop(row, None)
        for row, cache_len, input_len in zip(members, cache_lens, input_lens, strict=True):
            if cache_len != reached.get(row, cache_len):
                assert cache_len < reached[row]
                unlogged[row] -= 1
            reached[row] = cache_len + input_len
    assert min(unlogged) >= 0
    total = run.requests.column("input_tokens").to_numpy() + run.requests.column("output_tokens").to_numpy()
    assert all(value <= total[row] - 1 for row, value in reached.items())


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "jumps"])
@settings(max_examples=100)
@given(data=st.data())
def test_all_blocks_are_free_at_the_end(plain: bool, data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    engine = Engine(config, LATENCY, plain=plain)
    try:
        engine.run(build_requests(workload, config))
    except KvtwinError:
        return
    pool = engine.pool
    if isinstance(pool, BlockPool | ArrayPool):
        pool.check_invariants()
    assert pool.num_free == config.num_gpu_blocks - 1


@settings(max_examples=50)
@given(st.data())
def test_the_same_inputs_give_the_same_run(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    one, other = (run_or_stuck(workload, config, HostTime()) for _ in range(2))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.requests.equals(other.requests)
        assert one.steps.equals(other.steps)


@settings(max_examples=MANY)
@given(st.data())
def test_jumps_equal_the_plain_path_bit_for_bit(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    host = data.draw(HOSTS)
    latency = data.draw(MODELS)
    try:
        plain = simulate(workload, config, latency, host, plain=True)
    except KvtwinError:
        return
    jumped = simulate(workload, config, latency, host)
    assert jumped.requests.equals(plain.requests)
    assert jumped.steps.equals(plain.steps)
    unrecorded = simulate(workload, config, latency, host, record_steps=False)
    assert unrecorded.requests.equals(plain.requests)
    for run in (jumped, unrecorded):
        assert run.info.metrics["num_steps"] == plain.info.metrics["num_steps"]


def test_a_request_longer_than_the_model_is_refused() -> None:
    config = VllmConfig(num_gpu_blocks=100, max_model_len=64)
    table = from_columns(
        "requests",
        {"request_id": ["a", "b"], "arrival_ns": [0, 0], "input_tokens": [60, 60], "output_tokens": [4, 5]},
        "two requests",
    )
    with pytest.raises(KvtwinError, match=r"row 1, input_tokens: 60 \+ 5 tokens: longer than max_model_len \(64\)"):
        simulate(Run(RunInfo("workload"), {"requests": table}), config, LATENCY)


def test_prompts_in_many_chunks_are_no_livelock() -> None:
    """The event loop decodes and the plain loop sees chunks alone, many more than the KV cache has tokens."""
    config = VllmConfig(num_gpu_blocks=9, max_model_len=128, max_num_seqs=1, long_prefill_token_threshold=1)
    num_requests = 10
    columns = {
        "request_id": [f"r{row}" for row in range(num_requests)],
        "arrival_ns": [0] * num_requests,
        "input_tokens": [60] * num_requests,
        "output_tokens": [5] * num_requests,
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "long prompts")})
    assert simulate(workload, config, LATENCY).steps.equals(simulate(workload, config, LATENCY, plain=True).steps)


@settings(max_examples=50)
@given(st.data())
def test_progress_counts_every_request_once(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    counts: list[int] = []
    try:
        simulate(workload, config, LATENCY, record_steps=False, progress=counts.append)
    except KvtwinError:
        return
    assert sum(counts) == workload.requests.num_rows
