"""Speed, as ratios against a reference measured in the same run: `make bench`.

The reference is the plain path, which takes every step by itself and gives the same result bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvtwin.sim.config import VllmConfig
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

LATENCY = LinearLatency(8_000_000, 30_000, 15, 12_000)
CONFIG = VllmConfig(num_gpu_blocks=20_000, max_num_seqs=256, max_num_batched_tokens=2048, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def workload() -> Run:
    """2,000 requests of 1,024 + 256 tokens at 8 per second."""
    rng = np.random.default_rng(0)
    columns = {
        "request_id": [str(row) for row in range(2000)],
        "arrival_ns": np.cumsum(rng.exponential(1e9 / 8, 2000)).astype(np.int64),
        "input_tokens": np.full(2000, 1024),
        "output_tokens": np.full(2000, 256),
    }
    return Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "bench")})


@pytest.mark.benchmark(group="engine core")
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "jumps"])
def test_engine_core(benchmark: BenchmarkFixture, workload: Run, plain: bool) -> None:
    run = benchmark.pedantic(simulate, (workload, CONFIG, LATENCY), {"record_steps": False, "plain": plain}, rounds=3)
    benchmark.extra_info["num_steps"] = run.info.metrics["num_steps"]
    assert run.info.metrics["num_steps"] > 0


@pytest.mark.benchmark(group="statistics of a million batch members")
def test_statistics_of_a_steps_table(benchmark: BenchmarkFixture) -> None:
    rng = np.random.default_rng(0)
    offsets = np.arange(0, 1_000_000, 50)
    cache = rng.integers(0, 4000, 1_000_000)
    batches = benchmark(BatchStats.of_members, offsets, cache, np.ones(1_000_000, dtype=np.int64))
    assert batches.decode_context.sum() == cache.sum()
