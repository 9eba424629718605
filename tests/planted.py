"""Runs of simulated engines whose truth is known, and the faults that are planted in them: for the quick tests of
tests/validate and the studies of tests/fidelity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kvtwin.sim.engines import EngineConfig, engine_config, simulate_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

TRUTH = LinearLatency(base_ns=6_000_000, per_new_token_ns=40_000, per_context_token_ns=60, per_req_ns=20_000)
HOST = HostTime(schedule_ns=200_000, update_ns=150_000, frontend_ns=60_000_000)
VLLM: dict[str, Any] = {
    "engine": "vllm",
    "num_gpu_blocks": 420,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
}
SGLANG: dict[str, Any] = {
    "engine": "sglang",
    "version": "0.5.9",
    "max_total_tokens": 6144,
    "page_size": 16,
    "chunked_prefill_size": 512,
}
ENGINES = {
    "vllm": VLLM | {"async_scheduling": False},
    "vllm async": VLLM | {"async_scheduling": True},
    "sglang": SGLANG | {"disable_overlap_schedule": True},
    "sglang overlap": SGLANG,
}
TIMES = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns")


class Noisy:
    """The truth with lognormal noise on every step: an AR(1) over steps."""

    def __init__(self, seed: int, size: float, rho: float) -> None:
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=50_000)
        for step in range(1, len(noise)) if rho else ():
            noise[step] = rho * noise[step - 1] + np.sqrt(1 - rho**2) * noise[step]
        self._factor = np.exp(size * noise - size**2 / 2)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        factor = self._factor[first_step : first_step + len(batches)]
        times: IntArray = np.rint(TRUTH.step_ns(batches, first_step) * factor).astype(np.int64)
        return times


def workload(seed: int, num_requests: int = 250) -> Run:
    """Poisson arrivals; prompts of families that come and go share 320 tokens."""
    rng = np.random.default_rng(seed)
    family = np.maximum(np.arange(num_requests) // 10 - rng.geometric(0.4, num_requests) + 1, 0)
    num_blocks = rng.integers(21, 40, num_requests)
    hashes = [
        [1 + int(one) * 100 + block if block < 20 else 10_000 + row * 100 + block for block in range(total)]
        for row, (one, total) in enumerate(zip(family, num_blocks, strict=True))
    ]
    columns = {
        "request_id": [f"r{row}" for row in range(num_requests)],
        "arrival_ns": 1_000_000_000 + (np.cumsum(rng.exponential(0.08, num_requests)) * 1e9).astype(np.int64),
        "input_tokens": num_blocks * 16,
        "output_tokens": rng.integers(4, 60, num_requests),
        "block_hashes": hashes,
    }
    return Run(RunInfo("workload", hash_block_tokens=16), {"requests": from_columns("requests", columns, "made here")})


def config_of(settings: dict[str, Any]) -> EngineConfig:
    return engine_config(settings, "test")


def slower(factor: float) -> LinearLatency:
    return LinearLatency(**{name: round(factor * value) for name, value in TRUTH.to_json().items()})


class SlowNoisy(Noisy):
    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        times: IntArray = np.rint(1.1 * super().step_ns(batches, first_step)).astype(np.int64)
        return times


def edited(run: Run, columns: tuple[str, ...], change: Callable[[IntArray], IntArray], *, steps: bool = True) -> Run:
    """The run with some times of its requests changed."""
    table = run.requests
    for name in columns:
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(change(table.column(name).to_numpy())))
    return Run(run.info, {"requests": table, **({"steps": run.steps} if steps else {})})


def with_longer_steps(run: Run) -> Run:
    steps = run.steps
    start, end = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    index = steps.schema.get_field_index("end_ns")
    longer = pa.array(start + np.rint(1.1 * (end - start)).astype(np.int64))
    return Run(
        run.info, {"requests": run.requests, "steps": steps.set_column(index, steps.schema.field(index), longer)}
    )


def reversed_eviction(settings: dict[str, Any], sent: Run, latency: LatencyModel) -> Run:
    """What the engine would do that evicts the newest first."""
    if settings["engine"] == "sglang":
        return simulate_engine(sent, config_of(settings | {"radix_eviction_policy": "mru"}), latency, HOST)
    allocate = BlockPool.allocate

    def newest_first(pool: BlockPool, count: int) -> IntArray:
        for block in reversed(pool.free_order()):
            pool._free.move_to_end(block)
        return allocate(pool, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "allocate", newest_first)
        return simulate_engine(sent, config_of(settings), latency, HOST, plain=True)


def early(times: IntArray) -> IntArray:
    return times - 50_000_000


def told(run: Run, as_of: Run) -> Run:
    """The run, said to be of another engine's settings: those that the prediction goes by."""
    return Run(as_of.info, {"requests": run.requests, "steps": run.steps})
