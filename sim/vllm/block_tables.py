"""The KV blocks of the running requests as an event loop needs them: all of them at once, or one at an event.

Which decodes need a new block at step s depends on s modulo the block size alone: a request joins the decodes with a
*base*, its cache_len at step 0 had it decoded since then, so its cache_len at step s is base + s. Two keepers with one
interface: `CountedBlocks` where nobody can share blocks, so that only their number matters, and `PooledBlocks` with
the real pool. Both decide as `KVCacheManager` does (tests/property).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvtwin.sim.config import VllmConfig
from kvtwin.sim.vllm.array_pool import ArrayPool
from kvtwin.sim.vllm.counted_pool import CountedPool
from kvtwin.sim.vllm.request import NO_BLOCKS, IntArray, RequestBook


class BlockTables(Protocol):
    """Blocks of the requests that an event loop runs; requests are named by row."""

    def num_steps_that_fit(self, step: int, num_decode: int, most: int) -> int:
        """For how many steps from `step` on, at most `most`, the free blocks suffice for all decodes."""

    def grow(self, step: int, count: int, num_decode: int) -> None:
        """Give the decodes the blocks that they need at `count` steps from `step` on."""

    def grow_one(self, row: int) -> None:
        """Give one decode the block that it needs."""

    def admit(self, row: int, num_tokens: int, budget: int, beside_others: bool) -> tuple[int, int] | None:
        """Admit a waiting request with `num_tokens` known tokens: (cached tokens, new tokens); None if it must wait."""

    def num_crossing(self, step: int) -> int:
        """How many decodes need a block at a step."""

    def num_missing(self, num_computed: int, num_tokens: int) -> int:
        """Blocks that a request with `num_computed` tokens lacks to compute `num_tokens` more."""

    def extend(self, row: int, num_computed: int, num_tokens: int) -> None:
        """Give a request those blocks."""

    def join(self, row: int, base: int) -> None:
        """A request's decodes begin."""

    def leave(self, row: int, base: int) -> None:
        """A request's last decode is scheduled: it needs no more blocks."""

    def release(self, row: int) -> None:
        """A request is finished: its blocks are free."""

    def load(self, row: int, blocks: IntArray, num_cached: int) -> None:
        """Take over a running request from the plain path."""

    def unload(self, row: int, num_computed: int, num_known: int) -> tuple[IntArray, int]:
        """Hand a running request over to the plain path: its blocks and how many of them are in the prefix cache.

        Args:
            row: the request.
            num_computed: its tokens that are computed or scheduled to be.
            num_known: those of them that the scheduler knew when it last entered full blocks into the cache.
        """


class CountedBlocks:
    """Blocks that nobody shares."""

    def __init__(self, config: VllmConfig, requests: RequestBook, pool: CountedPool) -> None:
        self._pool, self._requests = pool, requests
        self._block_size = config.block_size
        self._watermark = int(config.watermark * config.num_gpu_blocks)
        self._chunked, self._whole = config.enable_chunked_prefill, config.scheduler_reserve_full_isl
        # How many decodes need a block at the steps with each remainder.
        self._crossing = [0] * config.block_size

    def num_steps_that_fit(self, step: int, num_decode: int, most: int) -> int:
        """See `BlockTables`."""
        free, block_size = self._pool.num_free, self._block_size
        if num_decode * (most // block_size + 1) <= free:
            return most
        fit = min(most, free // num_decode * block_size)  # whole rounds; the rest is looked at step by step
        free -= fit // block_size * num_decode
        while fit < most:
            free -= self._crossing[(step + fit) % block_size]
            if free < 0:
                break
            fit += 1
        return fit

    def num_crossing(self, step: int) -> int:
        """See `BlockTables`."""
        return self._crossing[step % self._block_size]

    def grow(self, step: int, count: int, num_decode: int) -> None:
        """See `BlockTables`."""
        block_size, crossing = self._block_size, self._crossing
        first = step % block_size
        if count == 1:
            self._pool.num_free -= crossing[first]
            return
        needed = 0
        if count >= block_size:
            rounds, count = divmod(count, block_size)
            needed = rounds * num_decode
        last = first + count
        if last > block_size:
            # All remainders but those from last - block_size to first.
            needed += num_decode - sum(crossing[last - block_size : first])
        else:
            needed += sum(crossing[first:last])
        self._pool.num_free -= needed

    def grow_one(self, row: int) -> None:  # noqa: ARG002
        """See `BlockTables`."""
        self._pool.num_free -= 1

    def admit(self, row: int, num_tokens: int, budget: int, beside_others: bool) -> tuple[int, int] | None:  # noqa: ARG002
        """See `BlockTables`."""
        chunk, block_size, pool = num_tokens, self._block_size, self._pool
        if chunk > budget:
            if not self._chunked:
                return None
            chunk = budget
        taken = -(-chunk // block_size)
        needed = -(-num_tokens // block_size) if self._whole else taken
        if needed + (self._watermark if beside_others else 0) > pool.num_free:
            return None
        pool.num_free -= taken
        return 0, chunk

    def num_missing(self, num_computed: int, num_tokens: int) -> int:
        """See `BlockTables`."""
        return -(-(num_computed + num_tokens) // self._block_size) - -(-num_computed // self._block_size)

    def extend(self, row: int, num_computed: int, num_tokens: int) -> None:
        """See `BlockTables`."""
        self._pool.num_free -= self.num_missing(num_computed, num_tokens)

    def join(self, row: int, base: int) -> None:  # noqa: ARG002
        """See `BlockTables`."""
        self._crossing[-base % self._block_size] += 1

    def leave(self, row: int, base: int) -> None:  # noqa: ARG002
        """See `BlockTables`."""
        self._crossing[-base % self._block_size] -= 1

    def release(self, row: int) -> None:
        """See `BlockTables`: the last token is sampled and never computed."""
        num_tokens = self._requests.num_prompt_tokens[row] + self._requests.max_tokens[row] - 1
        self._pool.num_free += -(-num_tokens // self._block_size)

    def load(self, row: int, blocks: IntArray, num_cached: int) -> None:
        """See `BlockTables`: the pool has counted them."""

    def unload(self, row: int, num_computed: int, num_known: int) -> tuple[IntArray, int]:  # noqa: ARG002
        """See `BlockTables`."""
        return np.zeros(-(-num_computed // self._block_size), dtype=np.int64), 0


class PooledBlocks:
    """Blocks of the real pool, with the prefix cache on."""

    def __init__(self, config: VllmConfig, requests: RequestBook, pool: ArrayPool) -> None:
        self._pool, self._requests = pool, requests
        self._block_size = config.block_size
        self._watermark = int(config.watermark * config.num_gpu_blocks)
        self._chunked, self._whole = config.enable_chunked_prefill, config.scheduler_reserve_full_isl
        self._caching = config.enable_prefix_caching
        # Which decodes need a block at the steps with each remainder, in the order of the running list.
        self._crossing: list[dict[int, None]] = [{} for _ in range(config.block_size)]
        # A block table: arrays as they were allocated, and the number of blocks in the prefix cache (of prompt
        # tokens only; output blocks enter when somebody could look them up).
        self._tables: dict[int, list[IntArray]] = {}
        self._num_cached: dict[int, int] = {}

    def num_steps_that_fit(self, step: int, num_decode: int, most: int) -> int:
        """See `BlockTables`."""
        free, block_size = self._pool.num_free, self._block_size
        if num_decode * (most // block_size + 1) <= free:
            return most
        fit = min(most, free // num_decode * block_size)
        free -= fit // block_size * num_decode
        while fit < most:
            free -= len(self._crossing[(step + fit) % block_size])
            if free < 0:
                break
            fit += 1
        return fit

    def num_crossing(self, step: int) -> int:
        """See `BlockTables`."""
        return len(self._crossing[step % self._block_size])

    def grow(self, step: int, count: int, num_decode: int) -> None:  # noqa: ARG002
        """See `BlockTables`: blocks are handed out in the order in which single steps would ask."""
        crossing, block_size = self._crossing, self._block_size
        if count == 1:
            rows: Sequence[int] = list(crossing[step % block_size])
        else:
            rows = [row for ahead in range(step, step + count) for row in crossing[ahead % block_size]]
        if not rows:
            return
        blocks = self._pool.allocate(len(rows))
        for place, row in enumerate(rows):
            self._tables[row].append(blocks[place : place + 1])

    def grow_one(self, row: int) -> None:
        """See `BlockTables`."""
        self._tables[row].append(self._pool.allocate(1))

    def admit(self, row: int, num_tokens: int, budget: int, beside_others: bool) -> tuple[int, int] | None:
        """See `BlockTables`."""
        pool, block_size = self._pool, self._block_size
        hits = pool.lookup(self._keys(row, (num_tokens - 1) // block_size)) if self._caching else NO_BLOCKS
        cached = len(hits) * block_size
        chunk = num_tokens - cached
        if chunk > budget:
            if not self._chunked:
                return None
            chunk = budget
        taken = -(-(cached + chunk) // block_size) - len(hits)
        needed = -(-num_tokens // block_size) - len(hits) if self._whole else taken
        needed += pool.num_unreferenced(hits) if len(hits) else 0
        if needed + (self._watermark if beside_others else 0) > pool.num_free:
            return None
        if len(hits):
            pool.touch(hits)
        self._tables[row] = [hits]
        self._num_cached[row] = len(hits)
        self._take(row, taken, min(cached + chunk, num_tokens))
        return cached, chunk

    def _keys(self, row: int, num_blocks: int) -> IntArray:
        request = self._requests.started.get(row)
        if request is not None:
            return request.block_keys(0, num_blocks)
        # Never preempted: nothing that only it could know is cached.
        return self._requests.prefix_keys[row][:num_blocks] if self._requests.prefix_keys is not None else NO_BLOCKS

    def _take(self, row: int, num_blocks: int, num_computed: int) -> None:
        """Allocate, and enter the blocks of known tokens that become full into the cache."""
        blocks = self._pool.allocate(num_blocks)
        table = self._tables[row]
        table.append(blocks)
        if not self._caching:
            return
        keys = self._keys(row, num_computed // self._block_size)
        first, last = self._num_cached[row], len(keys)
        if first < last:
            held = sum(map(len, table)) - len(blocks)
            if first < held:
                blocks = np.concatenate(table)[first:]
            else:
                blocks = blocks[first - held :]
            self._pool.cache(blocks[: last - first], keys[first:])
            self._num_cached[row] = last

    def num_missing(self, num_computed: int, num_tokens: int) -> int:
        """See `BlockTables`."""
        return -(-(num_computed + num_tokens) // self._block_size) - -(-num_computed // self._block_size)

    def extend(self, row: int, num_computed: int, num_tokens: int) -> None:
        """See `BlockTables`."""
        self._take(row, self.num_missing(num_computed, num_tokens), num_computed + num_tokens)

    def join(self, row: int, base: int) -> None:
        """See `BlockTables`."""
        self._crossing[-base % self._block_size][row] = None

    def leave(self, row: int, base: int) -> None:
        """See `BlockTables`."""
        del self._crossing[-base % self._block_size][row]

    def release(self, row: int) -> None:
        """See `BlockTables`: the last token is sampled and never computed."""
        blocks = np.concatenate(self._tables.pop(row))
        num_cached = self._num_cached.pop(row)
        if self._caching:
            num_tokens = self._requests.num_prompt_tokens[row] + self._requests.max_tokens[row] - 1
            self._pool.mark_own(blocks[num_cached : num_tokens // self._block_size])
        self._pool.free(blocks)

    def load(self, row: int, blocks: IntArray, num_cached: int) -> None:
        """See `BlockTables`."""
        self._tables[row] = [blocks]
        self._num_cached[row] = num_cached

    def unload(self, row: int, num_computed: int, num_known: int) -> tuple[IntArray, int]:  # noqa: ARG002
        """See `BlockTables`: output blocks enter the cache under their own names, for the request may come back."""
        blocks = np.concatenate(self._tables.pop(row))
        first = self._num_cached.pop(row)
        last = num_known // self._block_size if self._caching else 0
        if first < last:
            self._pool.cache(blocks[first:last], self._requests[row].block_keys(first, last))
        return blocks, max(first, last)
