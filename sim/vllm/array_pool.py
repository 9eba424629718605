"""The block pool of `kv/block_pool.py` as array operations: n blocks cost a few numpy calls, not n dict operations.

Same decisions in the same order (tests/contract runs both side by side). Three ideas:

- The free queue is a stretch of a long array. A block that is taken out of its middle leaves a hole, found through
  the block's position and skipped when the front reaches it; the stretch moves back to the middle when it hits an end.
- Contents are small integers, so the prefix-cache map is an array from key to block, and a prefix is matched by one
  gather. Two slots behind its end take what is written for blocks without a key, so that nothing needs to be masked.
- Keys of output blocks belong to one request. They matter only if it is preempted and comes back, so a block may
  simply be marked as holding such content (`OWN`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

NO_KEY = -1  # the block's content is in no map
OWN = -2  # output of one request, which will not come back: cached, and never looked up
OWN_LISTED = -3  # the same of one that may come back: `_own_key` knows which key
_HOLE = -1


class ArrayPool:
    """Blocks 1 .. num_gpu_blocks - 1, which of them are free, and what the prefix cache knows of each.

    Args:
        num_gpu_blocks: as vLLM counts them, the null block included.
        num_shared_keys: keys below it are looked up by any request; those from it on belong to one request each.
        enable_prefix_caching, reuse_uncached_first: as `BlockPool`'s.
        counts_evicted: keep `num_evicted`; else its value means nothing.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        *,
        num_shared_keys: int,
        enable_prefix_caching: bool,
        reuse_uncached_first: bool,
        counts_evicted: bool = True,
    ) -> None:
        self._counts_evicted = counts_evicted
        self.enable_prefix_caching = enable_prefix_caching
        self._reuse_uncached_first = reuse_uncached_first
        self._num_shared_keys = num_shared_keys
        self.num_free = 0
        self.num_evicted = 0
        self._ref_count = np.zeros(num_gpu_blocks, dtype=np.int64)
        self._key = np.full(num_gpu_blocks, NO_KEY, dtype=np.int64)
        # A key's first copy; the last three slots stand for the marks above and always hold no block.
        self._block_of = np.full(num_shared_keys + 3, _HOLE, dtype=np.int64)
        # Keys with several copies, and all own keys in use: their blocks in the order in which they were cached.
        self._copies: dict[int, dict[int, None]] = {}
        self._is_in_copies = np.zeros(num_shared_keys + 3, dtype=np.bool_)
        self._is_in_copies[OWN_LISTED] = True
        self._own_key: dict[int, int] = {}  # block -> own key
        # The free queue: _queue[_head:_tail], with holes.
        self._num_holes = 0
        self._queue = np.full(4 * num_gpu_blocks + 64, _HOLE, dtype=np.int64)
        self._places = np.arange(len(self._queue))
        self._position = np.zeros(num_gpu_blocks, dtype=np.int64)
        self._head = self._tail = len(self._queue) // 2 - num_gpu_blocks // 2
        self._append(np.arange(1, num_gpu_blocks))

    def lookup(self, keys: IntArray) -> IntArray:
        """Blocks of the longest cached prefix of `keys`. Changes nothing."""
        if not len(keys):
            return keys
        num_shared = self._num_shared(keys)
        blocks = self._block_of[keys[:num_shared]]
        if num_shared:
            missing = blocks < 0
            first = int(missing.argmax())
            if missing[first]:
                return blocks[:first]
        own = []
        for key in keys[num_shared:].tolist():
            copies = self._copies.get(key)
            if copies is None:
                break
            own.append(next(iter(copies)))
        return np.concatenate([blocks, own]).astype(np.int64) if own else blocks

    def _num_shared(self, keys: IntArray) -> int:
        """How many of a request's keys are shared ones; they come first."""
        if not len(keys) or keys[-1] < self._num_shared_keys:
            return len(keys)
        return int(np.searchsorted(keys >= self._num_shared_keys, True))

    def holds(self, key: int) -> bool:
        """Whether a shared key is in the map."""
        return bool(self._block_of[key] >= 0)

    def num_unreferenced(self, blocks: IntArray) -> int:
        """How many of these hit blocks lie in the free queue: taking them costs free blocks too."""
        return len(blocks) - int(np.count_nonzero(self._ref_count[blocks]))

    def touch(self, blocks: IntArray) -> None:
        """Reference hit blocks, taking those that nobody referenced out of the free queue."""
        idle = blocks[self._ref_count[blocks] == 0]
        if len(idle):
            self._queue[self._position[idle]] = _HOLE
            self._num_holes += len(idle)
            self.num_free -= len(idle)
        self._ref_count[blocks] += 1

    def allocate(self, count: int) -> IntArray:
        """Take `count` blocks from the front of the free queue; what they cached is forgotten.

        The caller has asked `num_free` first: too few is a fault of ours, and an IndexError.
        """
        if count > self.num_free:
            raise IndexError(f"{count} blocks asked of {self.num_free}")
        if count == 0:
            return self._queue[:0]
        self.num_free -= count
        head = self._head
        blocks = self._queue[head : head + count].copy()
        if self._num_holes and np.count_nonzero(blocks < 0):
            blocks = self._take_around_holes(count)
        else:
            self._head = head + count
        if self.enable_prefix_caching:
            self._forget(blocks, self._key[blocks])
        self._ref_count[blocks] = 1
        return blocks

    def _take_around_holes(self, count: int) -> IntArray:
        head, width = self._head, 2 * count
        while True:
            blocks = self._queue[head : min(head + width, self._tail)]
            blocks = blocks[blocks >= 0]
            if len(blocks) >= count:
                break
            width = 2 * width
        blocks = blocks[:count]
        self._head = int(self._position[blocks[-1]]) + 1
        self._num_holes -= self._head - head - count
        return blocks

    def allocate_one(self) -> int:
        """`allocate(1)[0]`."""
        if not self.num_free:
            raise IndexError("a block asked of none")
        self.num_free -= 1
        queue, head = self._queue, self._head
        block = int(queue[head])
        while block < 0:
            head += 1
            self._num_holes -= 1
            block = int(queue[head])
        self._head = head + 1
        key = int(self._key[block])
        if key != NO_KEY:
            self.num_evicted += 1
            self._block_of[key] = _HOLE
            self._key[block] = NO_KEY
            if self._is_in_copies[key]:
                self._forget_copy(block, key)
        self._ref_count[block] = 1
        return block

    def _forget(self, blocks: IntArray, keys: IntArray) -> None:
        """These blocks' contents leave the map."""
        self.num_evicted += len(keys) - int(np.count_nonzero(keys == NO_KEY)) if self._counts_evicted else 0
        self._block_of[keys] = _HOLE
        self._key[blocks] = NO_KEY
        if self._copies:
            several = self._is_in_copies[keys]
            if np.count_nonzero(several):
                for block, key in zip(blocks[several].tolist(), keys[several].tolist(), strict=True):
                    self._forget_copy(block, key)

    def _forget_copy(self, block: int, key: int) -> None:
        if key == OWN_LISTED:
            key = self._own_key.pop(block)
        copies = self._copies[key]
        del copies[block]
        shared = key < self._num_shared_keys
        if shared:
            self._block_of[key] = next(iter(copies), _HOLE)
        if not copies:
            del self._copies[key]
            if shared:
                self._is_in_copies[key] = False

    def cache(self, blocks: IntArray, keys: IntArray) -> None:
        """Enter full blocks into the prefix cache under their keys, which ascend from shared to own ones."""
        num_shared = self._num_shared(keys)
        if num_shared < len(keys):
            self._cache_own(blocks[num_shared:], keys[num_shared:])
            blocks, keys = blocks[:num_shared], keys[:num_shared]
        self._key[blocks] = keys
        known = self._block_of[keys] >= 0
        if np.count_nonzero(known):
            for block, key in zip(blocks[known].tolist(), keys[known].tolist(), strict=True):
                self._copies.setdefault(key, {int(self._block_of[key]): None})[block] = None
                self._is_in_copies[key] = True
            blocks, keys = blocks[~known], keys[~known]
        self._block_of[keys] = blocks

    def _cache_own(self, blocks: IntArray, keys: IntArray) -> None:
        for block, key in zip(blocks.tolist(), keys.tolist(), strict=True):
            self._key[block] = OWN_LISTED
            self._own_key[block] = key
            self._copies.setdefault(key, {})[block] = None

    def mark_own(self, blocks: IntArray) -> None:
        """Full blocks with output of a request that will never come back: cached, and never looked up."""
        self._key[blocks] = OWN

    def free(self, blocks: IntArray) -> None:
        """Give back a request's blocks, from its last to its first; see `BlockPool.free`."""
        cached = self._key[blocks] != NO_KEY
        self._free(blocks[cached], blocks[~cached]) if self._reuse_uncached_first else self._free(blocks, blocks[:0])

    def free_known(self, blocks: IntArray, num_cached: int) -> None:
        """`free`, for a request of whose blocks the first `num_cached` have a key and the others none."""
        if not self._reuse_uncached_first:
            num_cached = len(blocks)
        self._free(blocks[:num_cached], blocks[num_cached:])

    def _free(self, to_back: IntArray, to_front: IntArray) -> None:
        counts = self._ref_count[to_back] - 1
        self._ref_count[to_back] = counts
        if np.count_nonzero(counts):  # others still have them
            to_back = to_back[counts == 0]
        if len(to_front):  # without a key, so nobody else has them
            self._ref_count[to_front] = 0
            self._prepend(to_front[::-1])
        self._append(to_back[::-1])

    def _append(self, blocks: IntArray) -> None:
        count = len(blocks)
        if self._tail + count > len(self._queue):
            self._recentre()
        tail = self._tail
        self._queue[tail : tail + count] = blocks
        self._position[blocks] = self._places[tail : tail + count]
        self._tail = tail + count
        self.num_free += count

    def _prepend(self, blocks: IntArray) -> None:
        count = len(blocks)
        if self._head < count:
            self._recentre()
        head = self._head = self._head - count
        self._queue[head : head + count] = blocks
        self._position[blocks] = self._places[head : head + count]
        self.num_free += count

    def _recentre(self) -> None:
        """Move the queue to the middle of its array, without its holes: room for as much again at both ends."""
        live = self._queue[self._head : self._tail]
        live = live[live >= 0]
        self._head = len(self._queue) // 2 - len(live) // 2
        self._tail = self._head + len(live)
        self._queue[self._head : self._tail] = live
        self._num_holes = 0
        self._position[live] = self._places[self._head : self._tail]

    def free_order(self) -> list[int]:
        """The free queue from front to back, for tests."""
        live = self._queue[self._head : self._tail]
        return list(map(int, live[live >= 0]))

    def check_invariants(self) -> None:
        """INV-KV: a block is free exactly when nobody references it; the map names only blocks so keyed."""
        free = self.free_order()
        assert len(free) == self.num_free == len(set(free))
        assert set(free) == set(map(int, np.flatnonzero(self._ref_count[1:] == 0) + 1))
        named = np.flatnonzero(self._block_of >= 0)
        assert len(named) == 0 or named[-1] < self._num_shared_keys
        assert np.array_equal(self._key[self._block_of[named]], named)
        for key, copies in self._copies.items():
            assert copies, f"key {key} has no block"
            own = key >= self._num_shared_keys
            keys = [self._own_key.get(block) if own else int(self._key[block]) for block in copies]
            assert all(name == key for name in keys), f"key {key}"
