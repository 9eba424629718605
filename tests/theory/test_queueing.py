"""The simulator against queueing theory, before any hardware.

With one sequence at a time, one output token and a constant step, the engine is an M/D/1 queue.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

SERVICE_NS = 10_000_000


def poisson(rate_per_s: float, count: int, seed: int, output_tokens: int = 1) -> Run:
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1e9 / rate_per_s, count)).astype(np.int64)
    columns = {
        "request_id": [str(row) for row in range(count)],
        "arrival_ns": arrivals,
        "input_tokens": np.full(count, 8),
        "output_tokens": np.full(count, output_tokens),
    }
    return Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "poisson")})


def one_at_a_time(max_num_seqs: int = 1) -> VllmConfig:
    return VllmConfig(
        num_gpu_blocks=4096, max_num_seqs=max_num_seqs, enable_prefix_caching=False, async_scheduling=False
    )


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_wait_is_that_of_an_md1_queue(load: float) -> None:
    """Pollaczek-Khinchine for constant service: E[wait] = load * service / (2 * (1 - load)).

    Tolerance: 4 standard errors of the mean over 12 independent seeds, warm-up cut off.
    """
    latency = LinearLatency(SERVICE_NS, 0, 0, 0)
    waits = []
    for seed in range(12):
        run = simulate(poisson(load * 1e9 / SERVICE_NS, 4000, seed), one_at_a_time(), latency, record_steps=False)
        arrival, first = (run.requests.column(name).to_numpy() for name in ("arrival_ns", "first_token_ns"))
        waits.append(float(np.mean((first - arrival - SERVICE_NS)[500:])))
    expected = load * SERVICE_NS / (2 * (1 - load))
    assert abs(np.mean(waits) - expected) < 4 * np.std(waits, ddof=1) / np.sqrt(len(waits))


def test_littles_law_holds_exactly() -> None:
    """Requests in the system, integrated over time, equal the sum of their times in it (Little 1961)."""
    run = simulate(poisson(60.0, 800, 1, output_tokens=5), one_at_a_time(8), LinearLatency(SERVICE_NS, 0, 0, 0))
    arrival, finish = (run.requests.column(name).to_numpy() for name in ("arrival_ns", "finish_ns"))
    times = np.concatenate([arrival, finish])
    change = np.concatenate([np.ones(len(arrival)), -np.ones(len(finish))])
    order = np.argsort(times, kind="stable")
    present = np.cumsum(change[order])[:-1]
    assert np.sum(present * np.diff(times[order])) == np.sum(finish - arrival)


def test_throughput_never_exceeds_the_engines_capacity() -> None:
    run = simulate(poisson(1e6, 500, 2), one_at_a_time(), LinearLatency(SERVICE_NS, 0, 0, 0))
    finish = run.requests.column("finish_ns").to_numpy()
    assert finish.max() >= 500 * SERVICE_NS
