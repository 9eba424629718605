"""A block pool that only counts: enough where no block is ever found by what it holds."""

from __future__ import annotations

import numpy as np

from kvtwin.sim.vllm.request import NO_BLOCKS, IntArray


class CountedPool:
    """See `block_pool.Pool`; every block is called 0.

    Args:
        num_gpu_blocks: as vLLM counts them, the null block included.
    """

    def __init__(self, num_gpu_blocks: int) -> None:
        self.enable_prefix_caching = False
        self.num_free = num_gpu_blocks - 1
        self.num_evicted = 0

    def lookup(self, keys: IntArray) -> IntArray:  # noqa: ARG002
        """Nothing is cached."""
        return NO_BLOCKS

    def num_unreferenced(self, blocks: IntArray) -> int:  # noqa: ARG002
        """Nothing was hit."""
        return 0

    def touch(self, blocks: IntArray) -> None:
        """Nothing was hit."""

    def allocate(self, count: int) -> IntArray:
        """See `block_pool.Pool`."""
        self.num_free -= count
        return np.zeros(count, dtype=np.int64)

    def cache(self, blocks: IntArray, keys: IntArray) -> None:
        """Nothing is cached."""

    def free(self, blocks: IntArray) -> None:
        """See `block_pool.Pool`."""
        self.num_free += len(blocks)
