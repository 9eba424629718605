"""The cache that a server's settings ask for."""

from __future__ import annotations

from typing import Any

from kvtwin.sim.links import LinkTimes
from kvtwin.sim.sglang.chunk_cache import ChunkCache
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.hi_cache import HiRadixCache, PrefetchSettings
from kvtwin.sim.sglang.hi_tree import HiRadixTree, HiRules
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_cache import RadixCache
from kvtwin.sim.sglang.radix_tree import RadixTree
from kvtwin.sim.sglang.storage import StorageThreads
from kvtwin.sim.sglang.storage_index import StorageLimit


def build_cache(config: SglangConfig, pool: KvPool, clock: Clock) -> Any:
    """A `KvCache` over `pool`; with enable_hierarchical_cache a `HostKvCache`."""
    if config.disable_radix_cache:
        return ChunkCache(pool, counts_protected=config.rules.chunk_cache_counts_protected)
    if config.enable_hierarchical_cache:
        return _hi_cache(config, pool, clock)
    tree = RadixTree(config.page_size, config.radix_eviction_policy)
    return RadixCache(tree, pool, caches_outputs=config.rules.caches_outputs)


def _hi_cache(config: SglangConfig, pool: KvPool, clock: Clock) -> HiRadixCache:
    page_size, rules = config.page_size, config.rules
    # `HostKVCache.__init__`: a page more than the ratio asks for.
    host_tokens = (int(config.max_total_tokens * config.hicache_ratio) // page_size + 1) * page_size
    times = LinkTimes.of(config.hicache_links)
    tree = HiRadixTree(
        config.radix_eviction_policy,
        pool,
        KvPool(host_tokens, page_size),
        clock,
        times,
        HiRules(config.hicache_write_policy, rules.lists_host_leaves, rules.stores_written_back),
    )
    prefetch = PrefetchSettings.of(config.hicache_storage_prefetch_policy, config.hicache_storage_backend_extra_config)
    storage = None
    if config.hicache_storage_backend:
        threshold = max(prefetch.threshold, page_size)
        limit = StorageLimit.of(config.hicache_storage_backend_extra_config, page_size)
        storage = StorageThreads(clock, times, page_size, threshold, limit, lambda: tree.observer)
    return HiRadixCache(tree, pool, clock, caches_outputs=rules.caches_outputs, storage=storage, prefetch=prefetch)
