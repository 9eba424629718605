"""What the scheduler asks of a KV cache, whatever its levels: the calls of SGLang's `BasePrefixCache`."""

from __future__ import annotations

from typing import Any, Protocol

from kvtwin.sim.sglang.request import SglangRequest


class KvCache(Protocol):
    """A cache over one device pool. Sizes are tokens; nodes are opaque to the scheduler."""

    @property
    def disable(self) -> bool:
        """Whether prefixes are never shared."""

    def evictable_size(self) -> int:
        """Tokens that an eviction could free."""

    def protected_size(self) -> int:
        """Tokens that running requests hold in the tree."""

    @property
    def num_evicted(self) -> int:
        """Tokens evicted from the device so far."""

    def match(self, request: SglangRequest, num_tokens: int) -> None:
        """Look up its first `num_tokens` tokens; sets prefix_len, last_node, last_host_node and host_hit_len."""

    def inc_lock_ref(self, node: Any) -> None:
        """Keep the path to a node from being evicted."""

    def dec_lock_ref(self, node: Any) -> None:
        """Take one lock from the path to a node."""

    def evict(self, num_tokens: int) -> None:
        """Free at least `num_tokens` of the device pool, if that many are evictable."""

    def cache_unfinished_req(self, request: SglangRequest, *, chunked: bool = False) -> None:
        """Insert what has been prefilled (`fill_len` tokens) and move the request's lock there."""

    def cache_finished_req(self, request: SglangRequest, *, is_insert: bool = True) -> None:
        """Insert what is to be kept, free the rest of its `kv_len` tokens, unlock."""


class HostKvCache(KvCache, Protocol):
    """A cache with levels below the device (`HiRadixCache`)."""

    def check_hicache_events(self) -> None:
        """Take in finished copies, loads and prefetches."""

    def init_load_back(self, request: SglangRequest) -> None:
        """Bring its host hit back to the device, or not; sets prefix_len and last_node."""

    def ready_to_load_host_cache(self) -> int | None:
        """Start the loads asked for; returns when they end, in ns, or None if there are none."""

    def prefetch(self, request: SglangRequest) -> None:
        """A request has come to the queue, and was matched: start to read what storage holds of it."""

    def check_prefetch_progress(self, request: SglangRequest) -> bool:
        """Whether the request may be considered: its prefetch has ended, or is ended now."""

    def next_event_ns(self) -> int | None:
        """When the next transfer after now ends."""
