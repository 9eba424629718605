"""The paged KV block pool of vLLM V1: reference counts, prefix-cache map, LRU free queue.

Follows `vllm/v1/core/block_pool.py` (`BlockPool`, `FreeKVCacheBlockQueue`, `BlockHashToBlockMap`) and
`single_type_kv_cache_manager.py` (`FullAttentionManager`), 0.32.0 and 0.19.0. Block 0 is the null block
and never handed out. A block's content is named by an integer key: equal keys, equal token prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Pool(Protocol):
    """What a block pool does; `BlockPool` is the specification, `array_pool.ArrayPool` the fast one.

    Attributes:
        enable_prefix_caching: whether blocks are ever given a key.
        num_free: blocks in the free queue; cached blocks that nobody references are among them.
        num_evicted: cached blocks that were handed out anew so far.
    """

    enable_prefix_caching: bool
    num_evicted: int

    @property
    def num_free(self) -> int:
        """See above."""

    def lookup(self, keys: IntArray) -> IntArray:
        """Blocks of the longest cached prefix of `keys`. Changes nothing."""

    def num_unreferenced(self, blocks: IntArray) -> int:
        """How many of these hit blocks lie in the free queue: taking them costs free blocks too."""

    def touch(self, blocks: IntArray) -> None:
        """Reference hit blocks, taking those that nobody referenced out of the free queue."""

    def allocate(self, count: int) -> IntArray:
        """Take `count` blocks from the front of the free queue; what they cached is forgotten.

        The caller has asked `num_free` first.
        """

    def cache(self, blocks: IntArray, keys: IntArray) -> None:
        """Enter full blocks into the prefix cache under their keys."""

    def free(self, blocks: IntArray) -> None:
        """Give back a request's blocks, from its last to its first."""


class BlockPool:
    """Blocks 1 .. num_gpu_blocks - 1, which of them are free, and what the prefix cache knows of each.

    Args:
        num_gpu_blocks: as vLLM counts them, the null block included.
        enable_prefix_caching: without it no block is ever given a key.
        reuse_uncached_first: where a freed block without a key goes. True: to the front of the free queue
            (0.32 `free_blocks`, `prepend_n`). False: to the back like all others (0.19).
    """

    def __init__(self, num_gpu_blocks: int, *, enable_prefix_caching: bool, reuse_uncached_first: bool) -> None:
        self.enable_prefix_caching = enable_prefix_caching
        self._reuse_uncached_first = reuse_uncached_first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_gpu_blocks))
        self._ref_count = [0] * num_gpu_blocks
        self._key: list[int | None] = [None] * num_gpu_blocks
        # Two requests that compute the same block keep both copies (vLLM de-duplicates nothing, so that
        # block tables stay append-only); a lookup takes the copy inserted first among those left.
        self._cached: dict[int, dict[int, None]] = {}
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """See `Pool`."""
        return len(self._free)

    def lookup(self, keys: IntArray) -> IntArray:
        """See `Pool`."""
        blocks = []
        for key in keys.tolist():
            copies = self._cached.get(key)
            if copies is None:
                break
            blocks.append(next(iter(copies)))
        return np.array(blocks, dtype=np.int64)

    def num_unreferenced(self, blocks: IntArray) -> int:
        """See `Pool`."""
        return sum(self._ref_count[block] == 0 for block in blocks.tolist())

    def touch(self, blocks: IntArray) -> None:
        """See `Pool`."""
        for block in blocks.tolist():
            if self._ref_count[block] == 0:
                del self._free[block]
            self._ref_count[block] += 1

    def allocate(self, count: int) -> IntArray:
        """See `Pool`. Too few is a fault of ours, and a KeyError."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_count[block] = 1
            blocks.append(block)
        return np.array(blocks, dtype=np.int64)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is None:
            return
        copies = self._cached[key]
        del copies[block]
        if not copies:
            del self._cached[key]
        self._key[block] = None
        self.num_evicted += 1

    def cache(self, blocks: IntArray, keys: IntArray) -> None:
        """See `Pool`."""
        for block, key in zip(blocks.tolist(), keys.tolist(), strict=True):
            self._key[block] = key
            self._cached.setdefault(key, {})[block] = None

    def free(self, blocks: IntArray) -> None:
        """See `Pool`.

        Those still shared stay; a cached block goes to the back of the queue (evicted last), one without
        a key to the front, so that the request's last block is reused first (0.32), or to the back (0.19).
        """
        uncached_first = []
        for block in reversed(blocks.tolist()):
            self._ref_count[block] -= 1
            if self._ref_count[block]:
                continue
            if self._reuse_uncached_first and self._key[block] is None:
                uncached_first.append(block)
            else:
                self._free[block] = None
        for block in reversed(uncached_first):
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def free_order(self) -> list[int]:
        """The free queue from front to back, for tests."""
        return list(self._free)

    def check_invariants(self) -> None:
        """INV-KV: a block is free exactly when nobody references it; the map names only blocks so keyed."""
        for block in range(1, len(self._ref_count)):
            assert (self._ref_count[block] == 0) == (block in self._free), f"block {block}"
        for key, copies in self._cached.items():
            assert copies, f"key {key} has no block"
            assert all(self._key[block] == key for block in copies), f"key {key}"
