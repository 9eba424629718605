"""HiCache's corners, one at a time."""

from __future__ import annotations

import pytest

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.links import LinkTimes
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.hi_tree import HiRadixTree, HiRules
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.runs import Runs
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

FIRST, SECOND = ((1_000, 40),), ((2_000, 40),)


def insert(tree: HiRadixTree, device: KvPool, key: Runs) -> None:
    """Compute a key of 40 tokens and keep it."""
    assert device.alloc(40)
    device.free(tree.insert(key, 40))


@pytest.mark.parametrize("version", ["0.5.6", "0.5.9"])
def test_write_back_loads_what_it_has_just_dropped_and_counts_it_twice(version: str) -> None:
    newer = version == "0.5.9"
    device, host, clock = KvPool(50, 1), KvPool(50, 1), Clock()
    rules = HiRules("write_back", lists_host_leaves=newer, stores_written_back=newer)
    tree = HiRadixTree("lru", device, host, clock, LinkTimes(), rules)
    insert(tree, device, FIRST)
    tree.evict(40)
    insert(tree, device, SECOND)
    _, _, host_hit, host_node = tree.match_path(FIRST, 40)
    assert host_hit == 40
    # To make room, the second is copied to a full host, which drops the first.
    assert tree.load_back(host_node) is host_node
    assert tree.match_path(FIRST, 40)[2] == 0
    assert device.available + tree.evictable + tree.protected == device.size
    # The request that asked for it inserts its slots again.
    tree.insert(FIRST, 40)
    assert device.available + tree.evictable + tree.protected == device.size + 40
    tree.start_loading()
    clock.advance(10**9)
    tree.check_loads()
    assert (tree.protected, tree.evictable) == (0, 80)
    assert tree.evict(80) == (80 if newer else 40)


def test_prefetches_are_limited_by_the_host_memory_that_mirrors_nothing() -> None:
    """0.8 x (4096 x 1.25 - 4096) = 819 tokens may be asked for at a time; the rest of a burst asks for nothing."""
    config = SglangConfig(
        max_total_tokens=4096,
        page_size=16,
        enable_hierarchical_cache=True,
        hicache_ratio=1.25,
        hicache_storage_backend="file",
        max_running_requests=1,
    )
    num_requests = 8
    columns = {
        "request_id": [f"r{row}" for row in range(num_requests)],
        "arrival_ns": [0] * num_requests,
        "input_tokens": [400] * num_requests,
        "output_tokens": [4] * num_requests,
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "a burst")})
    run = simulate_sglang(workload, config, LinearLatency(1_000_000, 20_000, 50, 10_000), record_cache=True)
    started = run.cache.column("kind").to_pylist().count("prefetch_start")
    assert run.info.metrics["num_prefetches_limited"] == num_requests - started
    assert started == 3  # 0, 400 and 800 tokens were held before them
