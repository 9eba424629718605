"""A disk under the host: 0.32.0's `kv_offload/tiering/manager.py` with its `fs` tier.

What has been stored on the host goes on to the disk. Whether the disk holds a block is asked of a thread: the first
lookup of a block only asks, a later one has the answer, and the answer stays as it was for as long as a request that
asked is there (`async_lookup.py`). What is only there is brought to the host first, and the request asks again.

Ours: one thread for each kind of work (vLLM's pool has 16), and a disk that is full drops what was read or written
longest ago (vLLM's is not bounded).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.links import Link, LinkTimes
from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.offload.level import ABSENT, READY, WRITING, Level
from kvtwin.sim.vllm.request import NO_BLOCKS

# What is known of a block's being on the disk.
_UNASKED: Final = 0
_ASKED: Final = 1
_THERE: Final = 2
_NOT_THERE: Final = 3

Note = Callable[[str, IntArray, int], None]  # kind of event, keys, row


class Disk:
    """The blocks below the host's.

    Args:
        num_blocks: what it holds.
        num_keys: every key is below it.
        host: the level above.
        links: what queries, reads and writes take; a page is a block.
        note: told of what happens to the disk's blocks.
        on_promoted: told of each row whose blocks begin their way to the host, or have been seen to end it: row, whether
            they begin, when.
        on_access: told of the blocks that are brought for a row, or that find no room.

    Attributes:
        level: what it holds.
    """

    def __init__(
        self,
        num_blocks: int,
        num_keys: int,
        host: Level,
        links: LinkTimes,
        note: Note,
        on_promoted: Callable[[int, bool, int], None],
        on_access: Callable[[int, IntArray], None],
    ) -> None:
        self.level = Level(num_blocks, num_keys, lambda keys: note("evict", keys, -1))
        self._host, self._note, self._on_promoted, self._on_access = host, note, on_promoted, on_access
        self._query = Link(links.query_base, links.query_per_page)
        self._read = Link(links.read_base, links.read_per_page)
        self._write = Link(links.write_base, links.write_per_page)
        self._known = np.zeros(num_keys, np.int8)
        self._num_askers = np.zeros(num_keys, np.int16)
        self._asked_by: dict[int, list[IntArray]] = {}  # keys, by row
        self._is_asked = np.zeros(num_keys, np.bool_)  # a mark that is set and cleared within a call
        self._questions: list[int] = []  # keys of this schedule() call
        self._answers: list[tuple[int, int, list[int]]] = []  # heap: when, order, keys
        self._promotions: dict[int, list[IntArray]] = {}  # keys of this schedule() call, by row
        self._jobs: list[tuple[int, int, Callable[[int], None]]] = []  # heap: end, order, what happens then
        self._num_jobs = 0
        self._is_polled = False  # since the last schedule() call's end
        self._sources: dict[int, set[int]] = {}  # by row: keys that it had brought from here

    def next_ns(self) -> int | None:
        """When the next job or answer comes."""
        return min((times[0][0] for times in (self._jobs, self._answers) if times), default=None)

    @property
    def has_jobs(self) -> bool:
        """Whether reads or writes are under way."""
        return bool(self._jobs)

    def poll(self, now_ns: int) -> None:
        """See what has ended, once per schedule() call (`_maybe_process_finished_jobs`)."""
        if not self._is_polled:
            self._is_polled = True
            while self._jobs and self._jobs[0][0] <= now_ns:
                heappop(self._jobs)[2](now_ns)

    def take_answers(self, now_ns: int) -> None:
        """What the asking thread has found out by now."""
        while self._answers and self._answers[0][0] <= now_ns:
            for key in heappop(self._answers)[2]:
                there = self.level.state[key] == READY
                gone = self._num_askers[key] == 0  # nobody wants to know any more
                self._known[key] = _UNASKED if gone else _THERE if there else _NOT_THERE

    def scan(self, row: int, keys: IntArray) -> int | None:
        """How many of a prefix's blocks the host has ready, from the first on, after bringing what the disk has; None
        while something is on its way or being asked for (`_maximal_prefix_lookup` with this manager's `lookup`)."""
        place, waits = 0, False
        while place < len(keys):
            states = self._host.state[keys[place:]]
            held = states != ABSENT
            num_held = len(held) if held.all() else int((~held).argmax())
            waits |= bool((states[:num_held] == WRITING).any())
            place += num_held
            if place == len(keys):
                break
            missing = states[num_held:] == ABSENT
            rest = keys[place : place + (len(missing) if missing.all() else int((~missing).argmax()))]
            taken = self._take(row, rest)
            waits |= taken > 0
            place += taken
            if taken < len(rest):
                break
        return None if waits else place

    def _take(self, row: int, keys: IntArray) -> int:
        """Ask for, or bring, blocks that the host has not; returns how many until one that is nowhere."""
        known = self._known[keys]
        stop = known == _NOT_THERE
        taken = int(stop.argmax()) if stop.any() else len(keys)
        there = np.flatnonzero(known[:taken] == _THERE)
        num_promoted = self._promote(row, keys[there])
        if num_promoted < len(there):
            taken = int(there[num_promoted])
        self._ask(row, keys[: taken + 1], known[: taken + 1])
        return taken

    def _ask(self, row: int, keys: IntArray, known: npt.NDArray[np.int8]) -> None:
        asked = self._asked_by.setdefault(row, [])
        self._is_asked[keys] = True
        for earlier in asked:
            self._is_asked[earlier] = False
        new = keys[self._is_asked[keys]]
        self._is_asked[keys] = False
        if len(new):
            asked.append(new)
            self._num_askers[new] += 1
        unasked = keys[known == _UNASKED]
        self._known[unasked] = _ASKED
        self._questions += unasked.tolist()

    def _promote(self, row: int, keys: IntArray) -> int:
        """Bring blocks to the host (`_initiate_promotion`, once for each); returns how many until one for which there
        is no room, or that is gone by now."""
        count = min(self.level.num_ready(keys), self._host.num_room)
        self._on_access(row, keys[: count + 1][self.level.state[keys[: count + 1]] == READY])
        if count < len(keys) and self.level.state[keys[count]] != READY:
            self._known[keys[count]] = _NOT_THERE
        keys = keys[:count]
        if count:
            self._host.prepare_store(keys)
            self.level.touch(keys)
            self.level.read(keys)
            self._promotions.setdefault(row, []).append(keys)
            self._sources.setdefault(row, set()).update(keys.tolist())
        return count

    def end_schedule(self, now_ns: int) -> None:
        """Send this schedule() call's reads and questions (`on_schedule_end`)."""
        self.poll(now_ns)
        self._is_polled = False
        for row, parts in self._promotions.items():
            keys = np.concatenate(parts)
            self._note("prefetch_start", keys, row)
            self._on_promoted(row, True, now_ns)
            end_ns = self._read.send(now_ns, len(keys))
            self._at(end_ns, partial(self._promoted, row, keys))
        self._promotions = {}
        self.take_answers(now_ns)
        if self._questions:
            self._num_jobs += 1
            end_ns = self._query.send(now_ns, len(self._questions))
            heappush(self._answers, (end_ns, self._num_jobs, self._questions))
            self._questions = []

    def _at(self, end_ns: int, action: Callable[[int], None]) -> None:
        self._num_jobs += 1
        heappush(self._jobs, (end_ns, self._num_jobs, action))

    def _promoted(self, row: int, keys: IntArray, now_ns: int) -> None:
        self.level.read_done(keys)
        self._host.complete_store(keys)
        self._note("prefetch_done", keys, row)
        self._on_promoted(row, False, now_ns)

    def store(self, keys: IntArray, now_ns: int) -> None:
        """Blocks have come to the host: send them on (`complete_store`)."""
        self._host.read(keys)
        going = self.level.prepare_store(keys)
        num_blocks = 0 if going is None else len(going)
        end_ns = self._write.send(now_ns, num_blocks) if num_blocks else now_ns
        self._at(end_ns, partial(self._stored, keys, going))

    def _stored(self, keys: IntArray, going: IntArray | None, now_ns: int) -> None:  # noqa: ARG002 - as `_promoted`
        self._host.read_done(keys)
        if going is not None and len(going):
            self.level.complete_store(going)
            self._note("store", going, -1)

    def num_promoted(self, row: int, keys: IntArray) -> int:
        """How many of these blocks the request had brought from here."""
        sources = self._sources.get(row)
        return sum(key in sources for key in keys.tolist()) if sources else 0

    def forget(self, row: int) -> None:
        """The request has finished, and so have its copies: nobody needs what was found out for it alone."""
        self._sources.pop(row, None)
        asked = np.concatenate([NO_BLOCKS, *self._asked_by.pop(row, ())])
        self._num_askers[asked] -= 1
        gone = asked[(self._num_askers[asked] == 0) & (self._known[asked] != _ASKED)]
        self._known[gone] = _UNASKED
