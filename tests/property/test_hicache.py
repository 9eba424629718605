"""Servers with HiCache over random workloads and settings: decode stretches equal single steps, events included."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

sys.path.insert(0, str(Path(__file__).parent))
from sglang_invariants import check_tables  # type: ignore[import-not-found]  # beside this file

BLOCK_TOKENS = 64
LATENCY = LinearLatency(2_000_000, 2_000, 20, 50_000)


def random_workload(rng: random.Random) -> Run:
    """Up to 60 requests that share block chains, some with blocks of their own."""
    columns: dict[str, list[object]] = {
        name: [] for name in ("request_id", "arrival_ns", "input_tokens", "output_tokens", "block_hashes")
    }
    arrival_ns = 0
    for row in range(rng.randint(5, 60)):
        arrival_ns += rng.randint(0, 40_000_000)
        depth = rng.randint(1, 6)
        chain = [
            rng.randint(0, 2) * 100 + place if rng.random() < 0.8 else rng.randint(1000, 9999) for place in range(depth)
        ]
        length = rng.randint(BLOCK_TOKENS * (depth - 1) + 1, BLOCK_TOKENS * depth)
        for values, value in zip(
            columns.values(), (f"r{row}", arrival_ns, length, rng.randint(1, 60), chain), strict=True
        ):
            values.append(value)
    info = RunInfo("workload", hash_block_tokens=BLOCK_TOKENS)
    return Run(info, {"requests": from_columns("requests", columns, "random")}, name="random")


def random_server(rng: random.Random) -> SglangConfig:
    """A server short of memory, with slow or fast links, and storage or not."""
    write_policy = rng.choice(["write_through", "write_through_selective", "write_back"])
    return SglangConfig(
        rng.choice([768, 1024, 2048]),
        rng.choice(["0.5.6", "0.5.9"]),
        page_size=rng.choice([1, 4, 16]),
        schedule_policy=rng.choice(["fcfs", "lpm", "dfs-weight"]),
        chunked_prefill_size=rng.choice([64, 256, 8192]),
        disable_overlap_schedule=rng.random() < 0.5,
        radix_eviction_policy=rng.choice(["lru", "lfu", "fifo", "mru", "filo", "priority"]),
        enable_hierarchical_cache=True,
        hicache_ratio=rng.choice([1.1, 2.0, 4.0]),
        hicache_write_policy=write_policy,
        hicache_storage_backend=rng.choice(["", "file"]),
        hicache_storage_prefetch_policy=rng.choice(["best_effort", "wait_complete", "timeout"]),
        hicache_storage_backend_extra_config={
            "prefetch_threshold": rng.choice([16, 64]),
            "prefetch_timeout_base": 0.01,
            "max_tokens": rng.choice([None, 256, 2000]),
        },
        hicache_links={
            "d2h_per_token": rng.choice([10, 5_000, 100_000]), "read_per_page": rng.choice([100, 100_000, 3_000_000]),
            "write_per_page": rng.choice([100, 1_000_000]),
        },
    )  # fmt: skip


def outcome(workload: Run, config: SglangConfig, *, plain: bool) -> Run | str:
    """The run, or what stops it."""
    try:
        return simulate_sglang(workload, config, LATENCY, record_cache=True, plain=plain)
    except KvtwinError as error:
        return str(error)


@settings(max_examples=int(os.environ.get("KVTWIN_EXAMPLES", "100")), deadline=None)
@given(st.integers(0, 1 << 32))
def test_stretches_equal_single_steps_on_all_levels(seed: int) -> None:
    rng = random.Random(seed)
    workload, config = random_workload(rng), random_server(rng)
    plain, jumped = (outcome(workload, config, plain=plain) for plain in (True, False))
    if isinstance(plain, str) or isinstance(jumped, str):
        assert plain == jumped
    else:
        assert all(getattr(plain, table).equals(getattr(jumped, table)) for table in ("requests", "steps", "cache"))
        check_tables(plain)
