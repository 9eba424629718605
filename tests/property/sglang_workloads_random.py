"""Random workloads and SGLang servers: tight pools, small chunks, bursts, shared prefixes, priorities, both loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvtwin.sim.sglang.config import (
    EVICTION_POLICIES,
    PREFETCH_POLICIES,
    SCHEDULE_POLICIES,
    WRITE_POLICIES,
    SglangConfig,
)
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

HASH_BLOCK_TOKENS = 8


@st.composite
def configs(draw: st.DrawFn) -> SglangConfig:
    page_size = draw(st.sampled_from([1, 1, 4, 16]))
    pool = draw(st.integers(180, 300) | st.integers(180, 900)) // page_size * page_size
    by_priority = draw(st.sampled_from([False, False, True]))
    policies = ("fcfs", "lof") if by_priority else SCHEDULE_POLICIES
    levels = draw(st.sampled_from([{}, {}, {"disable_radix_cache": True}, None, None, None]))
    return SglangConfig(
        max_total_tokens=pool,
        version=draw(st.sampled_from(["0.5.6.post2", "0.5.9"])),
        page_size=page_size,
        max_running_requests=draw(st.integers(1, 14)),
        max_prefill_tokens=draw(st.integers(16, 200)),
        chunked_prefill_size=draw(st.sampled_from([-1, 16, 40, 64, 128])) // page_size * page_size,
        enable_mixed_chunk=draw(st.booleans()),
        schedule_policy=draw(st.sampled_from(policies)),
        schedule_conservativeness=draw(st.sampled_from([0.1, 0.5, 1.0])),
        disable_overlap_schedule=draw(st.booleans()),
        radix_eviction_policy=draw(st.sampled_from(EVICTION_POLICIES)),
        enable_priority_scheduling=by_priority,
        schedule_low_priority_values_first=draw(st.booleans()),
        priority_scheduling_preemption_threshold=draw(st.integers(0, 2)),
        random_seed=draw(st.integers(0, 9)),
        **(draw(host_levels()) if levels is None else levels),
    )


@st.composite
def host_levels(draw: st.DrawFn) -> dict[str, Any]:
    """A host level, and perhaps storage below it; transfers as fast as a step, or slower than many."""
    slow = draw(st.sampled_from([1, 100]))
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": draw(st.sampled_from([1.2, 1.5, 3.0])),
        "hicache_write_policy": draw(st.sampled_from(WRITE_POLICIES)),
        "hicache_storage_backend": draw(st.sampled_from(["", "file", "file", "file"])),
        "hicache_storage_prefetch_policy": draw(st.sampled_from(PREFETCH_POLICIES)),
        "hicache_storage_backend_extra_config": {
            "prefetch_threshold": 16,
            "prefetch_timeout_base": 0.01,
            "max_tokens": draw(st.sampled_from([None, 128, 700])),
        },
        "hicache_links": {
            "d2h_per_token": 300 * slow, "h2d_per_token": 300 * slow,
            "query_base": 2_000 * slow, "read_base": 1_000 * slow, "read_per_page": 2_000 * slow,
            "write_base": 1_000, "write_per_page": 1_000,
        },
    }  # fmt: skip


@st.composite
def workloads(draw: st.DrawFn, config: SglangConfig) -> Run:
    """Up to 30 requests whose prompts share prefixes by drawing block ids from a small tree, or up to 60 of few chains.

    A chain comes back after all levels but storage have dropped it: nothing else makes a prefetch find anything.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_chains = draw(st.sampled_from([0, 6, 12]))
    count = draw(st.integers(20, 60) if num_chains else st.integers(1, 30))
    # A chain that comes back before it was ever served is asked for in vain.
    mean_gap_ns = draw(st.sampled_from([30_000_000, 300_000_000] if num_chains else [0, 1_000_000, 30_000_000]))
    room = config.max_total_tokens - 4 * config.page_size - 8
    longest_output = draw(st.sampled_from([4, 30, 90]))
    outputs = rng.integers(1, min(longest_output, room // 2) + 1, count)
    shortest = 60 if num_chains else 1
    inputs = np.array([rng.integers(min(shortest, room - length), min(120, room - length) + 1) for length in outputs])
    columns: dict[str, Any] = {
        "request_id": [f"r{row}" for row in range(count)],
        "arrival_ns": np.cumsum(rng.integers(0, 2 * mean_gap_ns + 1, count)),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "priority": rng.integers(0, 4, count),
        "block_hashes": [_blocks(rng, -(-length // HASH_BLOCK_TOKENS), num_chains) for length in inputs.tolist()],
    }
    table = from_columns("requests", columns, "a random workload")
    return Run(RunInfo("workload", hash_block_tokens=HASH_BLOCK_TOKENS), {"requests": table})


def _blocks(rng: np.random.Generator, num_blocks: int, num_chains: int) -> list[int]:
    if num_chains:
        chain = 1000 * int(rng.integers(1, num_chains + 1))
        return [chain + depth for depth in range(num_blocks)]
    return [10 * depth + int(rng.integers(0, 2)) for depth in range(num_blocks)]
