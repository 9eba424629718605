"""Time before the queue and after the engine: planted delays come back, waits for a busy engine do not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtwin.traces
from kvtwin.calibrate.frontend import fit_frontend, frontend_accuracy
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"
CONFIG = VllmConfig(num_gpu_blocks=2000, async_scheduling=False, enable_prefix_caching=False)


def recorded(host: HostTime, seed: int = 0, *, requests: int = 200, rate: float = 4.0) -> Run:
    rng = np.random.default_rng(seed)
    columns = {
        "request_id": [f"r{i}" for i in range(requests)],
        "arrival_ns": np.cumsum(rng.exponential(1e9 / rate, requests)).astype(np.int64).tolist(),
        "input_tokens": rng.integers(10, 2000, requests).tolist(),
        "output_tokens": rng.integers(2, 20, requests).tolist(),
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "run")})
    return simulate(workload, CONFIG, LinearLatency(8_000_000, 10_000, 10, 0), host)


@pytest.mark.parametrize(
    "host",
    [HostTime(frontend_ns=3_000_000, output_ns=900_000), HostTime(frontend_ns=1_000_000, frontend_per_token_ns=800)],
)
def test_planted_times_come_back(host: HostTime) -> None:
    found, note = fit_frontend([recorded(host)], HostTime())
    assert found == host
    assert "arrivals at an idle engine" in note


def test_a_busy_engine_says_nothing_about_the_frontend() -> None:
    found, note = fit_frontend([recorded(HostTime(frontend_ns=3_000_000), rate=1000.0)], HostTime(gap_ns=5))
    assert found == HostTime(gap_ns=5)
    assert note == "none: the recordings do not show it"


def test_clocks_aligned_by_the_smallest_wait_say_nothing() -> None:
    run = recorded(HostTime(frontend_ns=0))  # queued the moment they arrive
    assert fit_frontend([run], HostTime())[0] == HostTime()


def test_held_out_errors_need_two_recordings() -> None:
    host = HostTime(frontend_ns=2_000_000, output_ns=1_000_000)
    runs = [recorded(host, seed) for seed in (0, 1)]
    assert frontend_accuracy(runs[:1]) == {}
    found = frontend_accuracy(runs)
    assert found["time before the queue"]["mape"] < 1e-6
    assert found["time to the client"]["n"] == 800


def test_the_simulator_adds_what_was_fitted() -> None:
    plain, delayed = recorded(HostTime()), recorded(HostTime(frontend_ns=2_000_000, output_ns=500_000))
    assert plain.requests.column("client_finish_ns").null_count == 200
    assert plain.requests.column("arrival_ns").equals(delayed.requests.column("arrival_ns"))
    first, client = (delayed.requests.column(name).to_numpy() for name in ("first_token_ns", "client_first_token_ns"))
    assert np.all(client - first == 500_000)
    waits = [
        run.requests.column("queued_ns").to_numpy() - run.requests.column("arrival_ns").to_numpy()
        for run in (plain, delayed)
    ]
    assert waits[0].min() == 0
    assert waits[1].min() == 2_000_000


def test_a_long_prompt_can_be_overtaken_before_the_queue() -> None:
    columns = {
        "request_id": ["long", "short"], "arrival_ns": [0, 1000], "input_tokens": [1000, 10], "output_tokens": [2, 2],
    }  # fmt: skip
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "run")})
    run = simulate(workload, CONFIG, LinearLatency(1000, 0, 0, 0), HostTime(frontend_per_token_ns=100))
    queued = run.requests.column("queued_ns").to_pylist()
    assert run.requests.column("request_id").to_pylist() == ["long", "short"]
    assert queued[0] > queued[1] >= 2000


def test_recordings_of_a_real_engine() -> None:
    """In-process submission costs less than vLLM's asynchronous client and its queue between processes."""
    sweeps, served = (
        fit_frontend([Run.open(RUNS / f"{name}_{number}") for number in (1, 2)], HostTime())[0]
        for name in ("sweep", "poisson")
    )
    assert 0 < sweeps.frontend_ns < served.frontend_ns < 4_000_000
    assert 0 < sweeps.output_ns < served.output_ns < 2_000_000
    profile = calibrate_steps([Run.open(RUNS / "poisson_1")])
    assert profile.host.frontend_ns > 1_000_000
    assert profile.host.schedule_ns > 0
