"""The KV blocks of the running requests as an event loop needs them: all of them at once, or one at an event.

Which decodes need a new block at step s depends on s modulo the block size alone: a request joins the decodes with a
*base*, its cache_len at step 0 had it decoded since then, so its cache_len at step s is base + s. Two keepers with one
interface: `CountedBlocks` where nobody can share blocks, so that only their number matters, and `PooledBlocks` with
the real pool. Both decide as `KVCacheManager` does (tests/property).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvtwin.sim.vllm.array_pool import ArrayPool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.counted_pool import CountedPool
from kvtwin.sim.vllm.request import NO_BLOCKS, IntArray, RequestBook

_FEW = 6  # so many blocks are quicker allocated one by one


@dataclass(slots=True)
class _Table:
    """The blocks of a request.

    Attributes:
        blocks: room for all it will ever need; the first `count` are there.
        num_cached: how many the prefix cache has been told of: of the prompt only, until somebody could look up more.
    """

    blocks: IntArray
    count: int
    num_cached: int


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

    def extend(self, row: int, num_computed: int, num_tokens: int) -> None:  # noqa: ARG002
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
    """Blocks of the real pool, with or without the prefix cache."""

    def __init__(self, config: VllmConfig, requests: RequestBook, pool: ArrayPool) -> None:
        self._pool, self._requests = pool, requests
        self._block_size = config.block_size
        self._watermark = int(config.watermark * config.num_gpu_blocks)
        self._chunked, self._whole = config.enable_chunked_prefill, config.scheduler_reserve_full_isl
        self._caching = config.enable_prefix_caching
        # Which decodes need a block at the steps with each remainder, in the order of the running list.
        self._crossing: list[dict[int, None]] = [{} for _ in range(config.block_size)]
        self._tables: dict[int, _Table] = {}
        # The request refused last for want of blocks: its first key that was not cached (None if all were), and the
        # blocks that it needs beside its hits.
        self._refused_row, self._refused_blocks = -1, 0
        self._refused_key: int | None = None

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
        if len(rows) < _FEW:
            for row in rows:
                self.grow_one(row)
            return
        for row, block in zip(rows, self._pool.allocate(len(rows)).tolist(), strict=True):
            table = self._tables[row]
            table.blocks[table.count] = block
            table.count += 1

    def grow_one(self, row: int) -> None:
        """See `BlockTables`."""
        table = self._tables[row]
        table.blocks[table.count] = self._pool.allocate_one()
        table.count += 1

    def admit(self, row: int, num_tokens: int, budget: int, beside_others: bool) -> tuple[int, int] | None:
        """See `BlockTables`."""
        pool, block_size = self._pool, self._block_size
        if row == self._refused_row and self._is_refused_still(beside_others):
            return None
        keys = self._keys(row, (num_tokens - 1) // block_size) if self._caching else NO_BLOCKS
        hits = pool.lookup(keys)
        num_hits = len(hits)
        cached = num_hits * block_size
        chunk = num_tokens - cached
        if chunk > budget:
            if not self._chunked:
                return None
            chunk = budget
        needed = -(-(num_tokens if self._whole else cached + chunk) // block_size) - num_hits
        if num_hits:
            needed += pool.num_unreferenced(hits)
        if needed + (self._watermark if beside_others else 0) > pool.num_free:
            if self._whole and row not in self._requests.started:
                self._refused_row = row
                self._refused_key = int(keys[num_hits]) if num_hits < len(keys) else None
                self._refused_blocks = -(-num_tokens // block_size) - num_hits
            return None
        self._refused_row = -1
        requests = self._requests
        most = -(-(requests.num_prompt_tokens[row] + requests.max_tokens[row]) // block_size)
        table = self._tables[row] = _Table(np.empty(most, dtype=np.int64), num_hits, num_hits)
        if num_hits:
            pool.touch(hits)
            table.blocks[:num_hits] = hits
        self.extend(row, cached, chunk)
        return cached, chunk

    def _is_refused_still(self, beside_others: bool) -> bool:
        """Whether the request refused last needs no new look: it hits no more than it did, and would not fit even if
        all that it hits were in use by others already."""
        if self._refused_key is not None and self._pool.holds(self._refused_key):
            return False
        return self._refused_blocks + (self._watermark if beside_others else 0) > self._pool.num_free

    def _keys(self, row: int, num_blocks: int) -> IntArray:
        """Names of a request's first blocks, as far as anybody could look them up."""
        started = self._requests.started
        if started and row in started:
            return started[row].block_keys(0, num_blocks)
        # Never preempted: nobody asks for blocks that only it could know.
        keys = self._requests.prefix_keys
        return NO_BLOCKS if keys is None else keys[row][:num_blocks]

    def num_missing(self, num_computed: int, num_tokens: int) -> int:
        """See `BlockTables`."""
        return -(-(num_computed + num_tokens) // self._block_size) - -(-num_computed // self._block_size)

    def extend(self, row: int, num_computed: int, num_tokens: int) -> None:
        """See `BlockTables`; the blocks of known tokens that become full enter the prefix cache."""
        table, block_size = self._tables[row], self._block_size
        held = table.count
        needed = -(-(num_computed + num_tokens) // block_size)
        if needed > held:
            table.blocks[held:needed] = self._pool.allocate(needed - held)
            table.count = needed
        if self._caching:
            keys = self._keys(row, (num_computed + num_tokens) // block_size)
            first, last = table.num_cached, len(keys)
            if first < last:
                self._pool.cache(table.blocks[first:last], keys[first:])
                table.num_cached = last

    def join(self, row: int, base: int) -> None:
        """See `BlockTables`."""
        self._crossing[-base % self._block_size][row] = None

    def leave(self, row: int, base: int) -> None:
        """See `BlockTables`."""
        del self._crossing[-base % self._block_size][row]

    def release(self, row: int) -> None:
        """See `BlockTables`: the last token is sampled and never computed."""
        table = self._tables.pop(row)
        blocks = table.blocks[: table.count]
        if not self._caching:
            self._pool.free(blocks)
            return
        num_tokens = self._requests.num_prompt_tokens[row] + self._requests.max_tokens[row] - 1
        num_full = num_tokens // self._block_size
        self._pool.mark_own(blocks[table.num_cached : num_full])
        self._pool.free_known(blocks, num_full)

    def load(self, row: int, blocks: IntArray, num_cached: int) -> None:
        """See `BlockTables`."""
        requests = self._requests
        most = -(-(requests.num_prompt_tokens[row] + requests.max_tokens[row]) // self._block_size)
        table = self._tables[row] = _Table(np.empty(most, dtype=np.int64), len(blocks), num_cached)
        table.blocks[: len(blocks)] = blocks

    def unload(self, row: int, num_computed: int, num_known: int) -> tuple[IntArray, int]:  # noqa: ARG002
        """See `BlockTables`: output blocks enter the cache under their own names, for the request may come back."""
        table = self._tables.pop(row)
        blocks = table.blocks[: table.count]
        first = table.num_cached
        last = num_known // self._block_size if self._caching else 0
        if first < last:
            self._pool.cache(blocks[first:last], self._requests[row].block_keys(first, last))
        return blocks, max(first, last)
