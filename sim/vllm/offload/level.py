"""The blocks of one level, least recently used first, as array operations.

A block is named by an integer key. When it was last wanted is a rank, a place in a long array of keys: whoever is
wanted gets a new place at the end, and its old one is stale. Victims are looked for from the front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

ABSENT: Final = 0
WRITING: Final = 1
READY: Final = 2

_LEAST_ROOM: Final = 64  # places
_LEAST_LOOK: Final = 64  # places looked at for victims


class Level:
    """Blocks by key (`kv_offload/cpu/manager.py` with `cpu/policies/lru.py`: 0.19.0 and 0.32.0 order them alike).

    Args:
        num_blocks: what it holds.
        num_keys: every key is below it.
        on_evict: told of the keys that are dropped.

    Attributes:
        state: by key: ABSENT, WRITING (its content is on the way) or READY.
    """

    def __init__(self, num_blocks: int, num_keys: int, on_evict: Callable[[IntArray], None]) -> None:
        self.num_blocks, self._on_evict = num_blocks, on_evict
        self.state = np.zeros(num_keys, np.int8)
        self._num_readers = np.zeros(num_keys, np.int16)
        self._rank = np.zeros(num_keys, np.int64)
        self._order = np.zeros(_LEAST_ROOM, np.int64)  # keys by rank
        self._head = self._end = 0
        self._num_held = self._num_evictable = 0

    def __len__(self) -> int:
        return self._num_held

    @property
    def num_room(self) -> int:
        """How many more it could take now, dropping others."""
        return self.num_blocks - self._num_held + self._num_evictable

    def num_ready(self, keys: IntArray) -> int:
        """How many of them, from the first on, can be read."""
        missing = self.state[keys] != READY
        first = int(missing.argmax()) if len(keys) else 0
        return first if len(keys) and missing[first] else len(keys)

    def touch(self, keys: IntArray) -> None:
        """They are wanted: a prefix's first block is the last to go."""
        self._give_ranks(keys[self.state[keys] != ABSENT][::-1])

    def _give_ranks(self, keys: IntArray) -> None:
        count = len(keys)
        if self._end + count > len(self._order):
            self._make_room(count)
        end = self._end
        self._order[end : end + count] = keys
        self._rank[keys] = np.arange(end, end + count)
        self._end = end + count

    def _make_room(self, count: int) -> None:
        """Leave the stale places out."""
        order = self._order[self._head : self._end]
        held = order[self._is_current(order, self._head)]
        self._order = np.zeros(max(_LEAST_ROOM, 4 * (len(held) + count)), np.int64)
        self._order[: len(held)] = held
        self._rank[held] = np.arange(len(held))
        self._head, self._end = 0, len(held)

    def _is_current(self, keys: IntArray, first: int) -> npt.NDArray[np.bool_]:
        """Which of the places from `first` on, with these keys, are their keys' own."""
        current: npt.NDArray[np.bool_] = self._rank[keys] == np.arange(first, first + len(keys))
        current &= self.state[keys] != ABSENT
        return current

    def prepare_store(self, keys: IntArray) -> IntArray | None:
        """Make room for those that are not there, none of the others going; returns these, or None where blocks in use
        leave too little room, with nothing changed.

        Args:
            keys: no key twice.
        """
        wanted: IntArray = keys[self.state[keys] == ABSENT]
        short = len(wanted) - (self.num_blocks - self._num_held)
        if short > 0 and not self._evict(short, keys):
            return None
        self.state[wanted] = WRITING
        self._num_held += len(wanted)
        self._give_ranks(wanted)
        return wanted

    def _evict(self, count: int, spared: IntArray) -> bool:
        """Drop the `count` least recently used that may go; False, with nothing dropped, if there are fewer."""
        if count > self._num_evictable:
            return False
        self._num_readers[spared] += 1
        victims = self._find_victims(count)
        self._num_readers[spared] -= 1
        if victims is None:
            return False
        self.state[victims] = ABSENT
        self._num_held -= count
        self._num_evictable -= count
        self._on_evict(victims)
        return True

    def _find_victims(self, count: int) -> IntArray | None:
        found: list[IntArray] = [self._order[:0]]
        num_found, place, all_stale, width = 0, self._head, True, max(_LEAST_LOOK, 2 * count)
        while num_found < count:
            if place >= self._end:
                return None
            last = min(self._end, place + width)
            width *= 2
            keys = self._order[place:last]
            current = self._is_current(keys, place)
            if all_stale:
                all_stale = not current.any()
                self._head = last if all_stale else place + int(current.argmax())
            may_go: IntArray = keys[current & (self.state[keys] == READY) & (self._num_readers[keys] == 0)]
            found.append(may_go[: count - num_found])
            num_found += len(found[-1])
            place = last
        return np.concatenate(found)

    def complete_store(self, keys: IntArray) -> IntArray:
        """Their content is there; returns those for which it was not before."""
        written: IntArray = keys[self.state[keys] == WRITING]
        self.state[written] = READY
        self._num_evictable += len(written)
        return written

    def read(self, keys: IntArray) -> None:
        """A transfer reads them: they stay until `read_done`."""
        self._num_evictable -= int(np.count_nonzero(self._num_readers[keys] == 0))
        self._num_readers[keys] += 1

    def read_done(self, keys: IntArray) -> None:
        """The transfer has ended."""
        self._num_readers[keys] -= 1
        self._num_evictable += int(np.count_nonzero(self._num_readers[keys] == 0))

    def check_invariants(self) -> None:
        """INV-TIER: never more than it holds, no reader of what is not there, every block has one place of its own."""
        assert self._num_held == np.count_nonzero(self.state) <= self.num_blocks
        assert np.all(self._num_readers >= 0)
        assert np.all(self.state[self._num_readers > 0] == READY)
        assert self._num_evictable == np.count_nonzero((self.state == READY) & (self._num_readers == 0))
        order = self._order[self._head : self._end]
        current = order[self._is_current(order, self._head)]
        assert len(current) == self._num_held == len(np.unique(current))
