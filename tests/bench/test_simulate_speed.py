"""What a simulation costs: the engine's core, the whole command, and growth. `make bench`; figures in extra_info.

Settings are those of Dynamo's replay by default (256 sequences, 8,192 tokens, blocks of 64), so that the two can be
set side by side: KVTWIN_DYNAMO_PYTHON names a Python that has `ai-dynamo-runtime`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

KVTWIN = str(Path(sys.executable).with_name("kvtwin"))
LATENCY = LinearLatency(8_000_000, 30_000, 15, 12_000)
ENGINE: dict[str, Any] = {
    "num_gpu_blocks": 16384,
    "block_size": 64,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
MOONCAKE = {"enable_prefix_caching": True}
TRACES: dict[str, tuple[str, dict[str, Any]]] = {
    "azure": ("azure2023/AzureLLMInferenceTrace_conv.csv.gz", {}),
    "azure-async": ("azure2023/AzureLLMInferenceTrace_conv.csv.gz", {"async_scheduling": True}),
    "mooncake-64": ("mooncake/conversation_trace.jsonl.gz", {**MOONCAKE, "num_gpu_blocks": 8192}),
    "mooncake-16": ("mooncake/conversation_trace.jsonl.gz", {**MOONCAKE, "num_gpu_blocks": 32768, "block_size": 16}),
}


def synthetic(count: int, input_tokens: int, output_tokens: int, rate: float) -> Run:
    """Poisson arrivals at `rate` per second, all of one shape."""
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1e9 / rate, count)).astype(np.int64)
    columns = {
        "request_id": [str(row) for row in range(count)],
        "arrival_ns": arrivals,
        "input_tokens": np.full(count, input_tokens),
        "output_tokens": np.full(count, output_tokens),
    }
    return Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "bench")})


def bench_core(
    benchmark: BenchmarkFixture, workload: Run, *, rounds: int = 5, plain: bool = False, **settings: Any
) -> None:
    config = VllmConfig(**{**ENGINE, **settings})
    core_s = []

    def once() -> Run:
        run = simulate(workload, config, LATENCY, record_steps=False, plain=plain)
        core_s.append(run.info.metrics["core_s"])
        return run

    run = benchmark.pedantic(once, rounds=rounds, warmup_rounds=0 if plain else 1)
    num_tokens, best_s = run.requests.column("output_tokens").to_numpy().sum(), min(core_s)
    benchmark.extra_info |= {
        "core_s": best_s,
        "num_steps": run.info.metrics["num_steps"],
        "steps_per_s": round(run.info.metrics["num_steps"] / best_s),
        "output_tokens_per_s": round(int(num_tokens) / best_s),
        "us_per_request": round(1e6 * best_s / run.requests.num_rows, 2),
    }
    assert run.requests.column("finish_ns").null_count == 0


@pytest.mark.benchmark(group="engine core, traces")
@pytest.mark.parametrize("name", TRACES)
def test_core_on_a_trace(benchmark: BenchmarkFixture, shared: Path, name: str) -> None:
    path, settings = TRACES[name]
    bench_core(benchmark, read_run(shared / "data" / "traces" / path), **settings)


@pytest.mark.benchmark(group="engine core, 10,000 x (1,024 + 256) at 8/s")
def test_core_on_w1(benchmark: BenchmarkFixture) -> None:
    bench_core(benchmark, synthetic(10_000, 1024, 256, 8))


@pytest.mark.benchmark(group="engine core against the plain path, 500 x (1,024 + 256) at 8/s")
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "jumps"])
def test_core_against_the_plain_path(benchmark: BenchmarkFixture, plain: bool) -> None:
    bench_core(benchmark, synthetic(500, 1024, 256, 8), plain=plain, rounds=2)


@pytest.mark.benchmark(group="engine core, decode-heavy: 2,000 requests")
@pytest.mark.parametrize("output_tokens", [100, 4000])
def test_core_with_long_outputs(benchmark: BenchmarkFixture, output_tokens: int) -> None:
    bench_core(benchmark, synthetic(2000, 512, output_tokens, 20))


@pytest.mark.benchmark(group="engine core, growth")
@pytest.mark.parametrize("count", [10_000, 100_000, 1_000_000])
def test_core_grows_with_requests(benchmark: BenchmarkFixture, count: int) -> None:
    bench_core(benchmark, synthetic(count, 512, 100, 20), rounds=1 if count > 100_000 else 3)


@pytest.mark.benchmark(group="whole command")
@pytest.mark.parametrize("name", TRACES)
def test_whole_command(benchmark: BenchmarkFixture, shared: Path, tmp_path: Path, name: str) -> None:
    path, settings = TRACES[name]
    (tmp_path / "engine.json").write_text(json.dumps({**ENGINE, **settings}))
    Profile(kind="linear", latency=LATENCY.to_json()).write(tmp_path / "profile.json")
    command = [
        *(KVTWIN, "simulate", str(shared / "data" / "traces" / path)),
        *("--engine", str(tmp_path / "engine.json"), "--profile", str(tmp_path / "profile.json"), "--json"),
    ]
    runs = iter(range(100))

    def once() -> str:
        output = ["-o", str(tmp_path / f"run{next(runs)}")]
        return subprocess.run([*command, *output], capture_output=True, text=True, check=True).stdout

    metrics = json.loads(benchmark.pedantic(once, rounds=3))["metrics"]
    names = ("load_s", "prepare_s", "core_s", "write_s", "peak_rss_bytes", "num_steps")
    benchmark.extra_info |= {name: metrics[name] for name in names}
    assert metrics["num_requests"] > 10_000


@pytest.mark.benchmark(group="kvtwin simulate --help")
def test_help(benchmark: BenchmarkFixture) -> None:
    command = [KVTWIN, "simulate", "--help"]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=5)
    assert b"--engine" in done.stdout


DYNAMO = """
import json, sys, time
from dynamo._core import run_mocker_trace_replay
started = time.perf_counter()
result = run_mocker_trace_replay([sys.argv[1]], extra_engine_args=sys.argv[2], trace_block_size=512)
print(json.dumps({"wall_s": time.perf_counter() - started, "core_s": result.summary["wall_time_ms"] / 1e3}))
"""


@pytest.fixture
def dynamo() -> Callable[[Path, dict[str, Any]], dict[str, float]]:
    python = os.environ.get("KVTWIN_DYNAMO_PYTHON")
    if not python:
        pytest.skip("KVTWIN_DYNAMO_PYTHON names no Python with ai-dynamo-runtime")

    def replay(trace: Path, engine: dict[str, Any]) -> dict[str, float]:
        command = [python, "-c", DYNAMO, str(trace), json.dumps({"engine": engine})]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        times: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
        return times

    return replay


@pytest.mark.benchmark(group="Dynamo's Rust replay, for reference")
@pytest.mark.parametrize("name", ["azure", "w1", "mooncake-64"])
def test_dynamo(
    benchmark: BenchmarkFixture,
    shared: Path,
    tmp_path: Path,
    dynamo: Callable[[Path, dict[str, Any]], dict[str, float]],
    name: str,
) -> None:
    path, settings = TRACES.get(name, ("", {}))
    workload = read_run(shared / "data" / "traces" / path) if path else synthetic(10_000, 1024, 256, 8)
    trace = tmp_path / "trace.jsonl"
    write_mooncake(workload, trace)
    names = ("num_gpu_blocks", "block_size", "enable_prefix_caching")
    engine = {key: value for key, value in {**ENGINE, **settings}.items() if key in names}
    times = benchmark.pedantic(dynamo, (trace, engine), rounds=3)
    benchmark.extra_info |= times
    assert times["core_s"] > 0


def write_mooncake(workload: Run, path: Path) -> None:
    """A request a line; where nothing is known of its content, it shares nothing."""
    names = ("arrival_ns", "input_tokens", "output_tokens", "block_hashes")
    columns = (workload.requests.column(name).to_pylist() for name in names)
    used, lines = 1 << 40, []
    for arrival_ns, num_inputs, num_outputs, hashes in zip(*columns, strict=True):
        if hashes is None:
            hashes = list(range(used, used - (-num_inputs // 512)))
            used += len(hashes)
        line = {"timestamp": arrival_ns // 1_000_000, "input_length": num_inputs, "output_length": num_outputs}
        lines.append(json.dumps({**line, "hash_ids": hashes[: -(-num_inputs // 512)]}))
    path.write_text("\n".join(lines) + "\n")
