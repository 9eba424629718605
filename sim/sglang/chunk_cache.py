"""What SGLang runs without a radix cache (`mem_cache/chunk_cache.py`): nothing is shared, nothing is kept."""

from __future__ import annotations

from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.request import SglangRequest


class ChunkCache:
    """Frees a request's KV when it ends.

    Args:
        pool: the device's KV slots.
        counts_protected: report prefilled tokens as protected (0.5.6).
    """

    disable = True
    num_evicted = 0

    def __init__(self, pool: KvPool, *, counts_protected: bool) -> None:
        self._pool, self._counts_protected = pool, counts_protected
        self._protected = 0

    def evictable_size(self) -> int:
        """Tokens that an eviction could free: none."""
        return 0

    def protected_size(self) -> int:
        """Tokens reported as in use."""
        return self._protected

    def evict(self, num_tokens: int) -> None:
        """Nothing can be evicted."""

    def match(self, request: SglangRequest, num_tokens: int) -> None:  # noqa: ARG002 - the caches' contract
        """Nothing is ever found."""
        request.prefix_len = request.host_hit_len = request.cache_protected_len = 0
        request.last_node = request.last_host_node = None

    def inc_lock_ref(self, node: object) -> None:
        """There is no tree to lock."""

    def dec_lock_ref(self, node: object) -> None:
        """There is no tree to unlock."""

    def cache_unfinished_req(self, request: SglangRequest, *, chunked: bool = False) -> None:  # noqa: ARG002
        """Its prefilled tokens count as its prefix from now on."""
        self._note_protected(request.fill_len - request.prefix_len)
        request.prefix_len = request.fill_len

    def cache_finished_req(self, request: SglangRequest, *, is_insert: bool = True) -> None:  # noqa: ARG002
        """Free its KV."""
        self._pool.free(self._pool.ceil(request.kv_len))
        self._note_protected(-request.prefix_len)

    def _note_protected(self, num_tokens: int) -> None:
        if self._counts_protected:
            self._protected += num_tokens
