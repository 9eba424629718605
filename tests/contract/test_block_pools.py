"""The block pools side by side: `ArrayPool` decides as `BlockPool` does, operation by operation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtwin.sim.vllm.array_pool import ArrayPool
from kvtwin.sim.vllm.block_pool import BlockPool, IntArray

NUM_SHARED_KEYS = 12


def array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


class TwoPools(RuleBasedStateMachine):
    """Requests come, hit, allocate, cache what is full, and go: whatever the order, both pools stay the same."""

    @initialize(num_blocks=st.integers(2, 14), reuse_uncached_first=st.booleans(), caching=st.booleans())
    def start(self, num_blocks: int, reuse_uncached_first: bool, caching: bool) -> None:
        self.plain = BlockPool(num_blocks, enable_prefix_caching=caching, reuse_uncached_first=reuse_uncached_first)
        self.arrays = ArrayPool(
            num_blocks,
            num_shared_keys=NUM_SHARED_KEYS,
            enable_prefix_caching=caching,
            reuse_uncached_first=reuse_uncached_first,
        )
        self.caching = caching
        # Requests: their blocks, how many of these are cached, and their keys (ascending: shared, then own).
        self.requests: list[tuple[list[int], int, list[int]]] = []
        self.gone: list[list[int]] = []  # keys of requests that may come back
        self.next_own = NUM_SHARED_KEYS

    def keys(self, data: st.DataObject) -> list[int]:
        come_back: bool = data.draw(st.booleans())
        if self.gone and come_back:
            old: list[int] = data.draw(st.sampled_from(self.gone))
            return old
        shared = sorted(data.draw(st.sets(st.integers(0, NUM_SHARED_KEYS - 1), max_size=6)))
        own = list(range(self.next_own, self.next_own + 4))
        self.next_own += 4
        return shared + own

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        keys = self.keys(data)
        hits = self.plain.lookup(array(keys)) if self.caching else array([])
        if self.caching:
            assert self.arrays.lookup(array(keys)).tolist() == hits.tolist()
            assert self.arrays.num_unreferenced(hits) == self.plain.num_unreferenced(hits)
        count = data.draw(st.integers(0, len(keys) - len(hits)))
        if self.plain.num_unreferenced(hits) + count > self.plain.num_free:
            return
        self.plain.touch(hits)
        self.arrays.touch(hits)
        blocks = self.plain.allocate(count)
        assert self.arrays.allocate(count).tolist() == blocks.tolist()
        self.requests.append(([*hits.tolist(), *blocks.tolist()], len(hits), keys))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        blocks, _, keys = data.draw(st.sampled_from(self.requests))
        if len(blocks) < len(keys) and self.plain.num_free:
            block = self.plain.allocate(1).tolist()
            assert self.arrays.allocate_one() == block[0]
            blocks += block

    @precondition(lambda self: self.requests and self.caching)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.requests) - 1))
        blocks, first, keys = self.requests[place]
        last = data.draw(st.integers(first, len(blocks)))
        for pool in (self.plain, self.arrays):
            pool.cache(array(blocks[first:last]), array(keys[first:last]))
        self.requests[place] = (blocks, last, keys)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        blocks, _, keys = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.plain.free(array(blocks))
        self.arrays.free(array(blocks))
        self.gone.append(keys)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """What is full and was never entered holds output that nobody will look up."""
        place = data.draw(st.integers(0, len(self.requests) - 1))
        blocks, first, _ = self.requests.pop(place)
        last = data.draw(st.integers(first, len(blocks))) if self.caching else 0
        self.plain.cache(array(blocks[first:last]), array(list(range(self.next_own, self.next_own + last - first))))
        self.next_own += last - first
        self.plain.free(array(blocks))
        self.arrays.mark_own(array(blocks[first:last]))
        if self.caching:
            self.arrays.free_known(array(blocks), last)
        else:
            self.arrays.free(array(blocks))

    @invariant()
    def they_are_the_same(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.arrays.free_order() == self.plain.free_order()
        assert self.arrays.num_free == self.plain.num_free
        assert self.arrays.num_evicted == self.plain.num_evicted
        self.arrays.check_invariants()
        self.plain.check_invariants()


TestTwoPools = TwoPools.TestCase
TestTwoPools.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_more_blocks_than_are_free_is_a_fault() -> None:
    pool = ArrayPool(3, num_shared_keys=0, enable_prefix_caching=False, reuse_uncached_first=True)
    with pytest.raises(IndexError, match="3 blocks asked of 2"):
        pool.allocate(3)
    pool.allocate(2)
    with pytest.raises(IndexError, match="a block asked of none"):
        pool.allocate_one()
