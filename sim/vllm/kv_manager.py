"""Blocks for requests: how many an allocation needs, whether they are there, and what enters the cache.

Follows `vllm/v1/core/kv_cache_manager.py` (`KVCacheManager.get_computed_blocks`, `allocate_slots`,
`can_fit_full_sequence` in 0.19) for one group of full-attention layers.
"""

from __future__ import annotations

import numpy as np

from kvtwin.sim.vllm.block_pool import IntArray, Pool
from kvtwin.sim.vllm.request import NO_BLOCKS, Request


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division, rounded up.

    >>> ceil_div(17, 16)
    2
    """
    return -(-numerator // denominator)


class KVCacheManager:
    """Allocates the KV blocks of requests from a pool.

    Args:
        pool: where the blocks come from.
        block_size: tokens per block.
        max_model_len: no request ever needs slots for more tokens.
        watermark_blocks: blocks that an admission must leave free.
    """

    def __init__(self, pool: Pool, *, block_size: int, max_model_len: int, watermark_blocks: int) -> None:
        self.pool = pool
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._watermark_blocks = watermark_blocks

    def computed_blocks(self, request: Request) -> IntArray:
        """The request's longest cached prefix, in blocks. At least one token is left to compute."""
        if not self.pool.enable_prefix_caching:
            return NO_BLOCKS
        max_blocks = (request.num_tokens - 1) // self._block_size
        return self.pool.lookup(request.block_keys(0, max_blocks))

    def can_admit(
        self,
        request: Request,
        num_new_tokens: int,
        hits: IntArray,
        *,
        whole_sequence: bool,
        watermark: bool,
        num_reserved: int = 0,
    ) -> bool:
        """Whether a waiting request fits: its chunk, beside `num_reserved` blocks, and, with `whole_sequence`, all its
        known tokens.

        Blocks hit in the cache that lie in the free queue count as needed too.
        """
        num_free = self.pool.num_free - self.pool.num_unreferenced(hits) - (self._watermark_blocks if watermark else 0)
        needed = self._num_blocks(len(hits) * self._block_size + num_new_tokens) - len(hits)
        if whole_sequence and max(needed, self._num_blocks(request.num_tokens) - len(hits)) > num_free:
            return False
        return needed <= num_free - num_reserved

    def _num_blocks(self, num_tokens: int) -> int:
        return ceil_div(min(num_tokens, self._max_model_len), self._block_size)

    def can_grow(self, request: Request, num_new_tokens: int) -> bool:
        """Whether a running request can be given `num_new_tokens` more."""
        missing = self._num_missing(request, num_new_tokens)
        return missing == 0 or missing <= self.pool.num_free

    def can_resume(self, request: Request, num_new_tokens: int, *, whole_sequence: bool, watermark: bool) -> bool:
        """`can_admit` for a waiting or swapped request whose computed tokens need no lookup."""
        num_tokens = request.num_computed_tokens + num_new_tokens
        if whole_sequence:
            num_tokens = max(num_tokens, request.num_tokens)
        num_tokens = min(num_tokens, self._max_model_len)
        needed = ceil_div(num_tokens, self._block_size) - len(request.blocks)
        return needed + (self._watermark_blocks if watermark else 0) <= self.pool.num_free

    def reserve(self, request: Request, num_blocks: int) -> None:
        """Allocate blocks whose content is loaded from a lower level; `loaded` enters them into the cache."""
        request.blocks = np.concatenate((request.blocks, self.pool.allocate(num_blocks)))
        request.num_computed_tokens += num_blocks * self._block_size

    def loaded(self, request: Request) -> None:
        """The content is there. At least one token is left to compute (`_update_waiting_for_remote_kv`)."""
        request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        self._cache(request, request.num_computed_tokens)

    def admit(self, request: Request, hits: IntArray) -> None:
        """Give a waiting request the blocks it hit."""
        self.pool.touch(hits)
        request.blocks = hits
        request.num_cached_blocks = len(hits)
        request.num_computed_tokens = len(hits) * self._block_size

    def grow(self, request: Request, num_new_tokens: int) -> None:
        """Allocate the blocks for `num_new_tokens` more, and enter those that become full into the cache.

        They enter when scheduled, not when computed, so a later request of the same step can hit them.
        Tokens still in flight are not known yet and enter later (`cache_known`).
        """
        missing = self._num_missing(request, num_new_tokens)
        if missing:
            request.blocks = np.concatenate((request.blocks, self.pool.allocate(missing)))
        self._cache(request, min(request.num_computed_tokens + num_new_tokens, request.num_tokens))

    def cache_known(self, request: Request) -> None:
        """Enter blocks filled by tokens that have become known (`AsyncScheduler._update_request_with_output`)."""
        self._cache(request, request.num_computed_tokens - request.num_output_placeholders)

    def free(self, request: Request) -> None:
        """Take all blocks from a finished or preempted request."""
        self.pool.free(request.blocks)
        request.blocks = NO_BLOCKS
        request.num_cached_blocks = 0

    def _num_missing(self, request: Request, num_new_tokens: int) -> int:
        # Asked of every running request at every step: calls would take half of the time.
        num_tokens = request.num_computed_tokens + num_new_tokens
        if num_tokens > self._max_model_len:  # noqa: PLR1730
            num_tokens = self._max_model_len
        missing = -(-num_tokens // self._block_size) - len(request.blocks)
        return missing if missing > 0 else 0  # noqa: FURB136

    def _cache(self, request: Request, num_tokens: int) -> None:
        if not self.pool.enable_prefix_caching:
            return
        first, last = request.num_cached_blocks, num_tokens // self._block_size
        if first < last:
            self.pool.cache(request.blocks[first:last], request.block_keys(first, last))
            request.num_cached_blocks = last
