"""What calibration costs: statistics of batches, a table's fit, predictions. `make bench`."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvtwin.calibrate.tables.calibrate import calibrate_tables
from kvtwin.calibrate.tables.candidates import fit_all
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.traces.readers.optable import OpTable, plain_samples


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
