"""Speed, as ratios against a reference measured in the same run: `make bench`.

The reference is the plain path, which takes every step by itself and gives the same result bit for bit.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvtwin.calibrate.tables.calibrate import calibrate_tables
from kvtwin.calibrate.tables.candidates import fit_all
from kvtwin.sim.config import VllmConfig
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.simulate import simulate
from kvtwin.traces.readers.optable import OpTable, plain_samples
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


DECODES, CONTEXTS, CHUNKS = (
    [1, 2, 4, 8, 16, 32, 64, 128, 256],
    [16 << i for i in range(11)],
    [16 << i for i in range(8)],
)


def kernel_table(rows: int) -> OpTable:
    """Attention of `rows` mixed batches or more, on a grid, with 1 % of noise."""
    axes = np.meshgrid(CHUNKS, CONTEXTS, DECODES, CONTEXTS * -(-rows // 8712), indexing="ij")
    chunk, prefix, decodes, context = (axis.ravel()[:rows].astype(np.int64) for axis in axes)
    noise = np.random.default_rng(0).normal(1.0, 0.01, len(chunk))
    times = (8.0 + 1e-4 * chunk * (prefix + chunk / 2) + 1e-3 * decodes * context) * noise
    load = {"chunk": chunk, "prefix": prefix, "num_decode": decodes, "context": context}
    return OpTable(Path("table"), "planted", [plain_samples("mixed attention", "mixed_attention", load, times)], {})


@pytest.mark.benchmark(group="calibrate a table of 20,000 rows: at most 10 s and 300 MB")
def test_calibrate_a_table_of_20_000_rows(benchmark: BenchmarkFixture) -> None:
    table = kernel_table(20_000)
    profile = benchmark.pedantic(calibrate_tables, ([table],), rounds=1)
    benchmark.extra_info["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    assert profile.provenance["models"][0]["rows"] == 20_000
    assert benchmark.stats is not None and benchmark.stats.stats.max < 10


@pytest.mark.benchmark(group="predict a million batches: 5 million a second")
@pytest.mark.parametrize("name", ["linear", "hybrid", "corrected"])
def test_predict_a_million_decode_batches(benchmark: BenchmarkFixture, name: str) -> None:
    decodes, context = (axis.ravel() for axis in np.meshgrid(DECODES, CONTEXTS, indexing="ij"))
    load = {"num_decode": decodes, "context": context}
    samples = plain_samples("decode", "decode_attention", load, 8.0 + 1e-3 * decodes * context)
    model = next(found for found in fit_all(samples, [132.0]) if found.name == name).to_model()
    rng = np.random.default_rng(0)
    batches = {"num_decode": rng.integers(1, 257, 1_000_000), "context": rng.integers(16, 16385, 1_000_000)}
    times = benchmark(model.time_us, batches)
    assert benchmark.stats is not None and len(times) == 1_000_000
    benchmark.extra_info["million_batches_per_s"] = round(1.0 / benchmark.stats.stats.median, 1)
