"""KV blocks below the GPU's pool: host memory, and a disk under it.

Follows vLLM 0.19.0's `OffloadingConnectorScheduler` (`kv_connector/v1/offloading/scheduler.py`:
`get_num_new_matched_tokens`, `update_state_after_alloc`, `_get_reqs_to_store`, `request_finished`) with
`kv_offload/cpu/manager.py` and `cpu/policies/lru.py`, and 0.32.0 where `VllmRules` says so. Read, not run; not followed:

* 0.19: a stored block can be read once its request has finished or was preempted (here: once its copy has ended, as in
  0.32), and requests that were passed over have a queue of their own;
* 0.32: a request with copies under way is not looked up; a finished request's blocks are free at once, and copies are
  flushed when somebody takes them; its last blocks are stored after its end; loads are admitted beside a reservation
  for all that are in flight (`_inflight_prefill_reserved_blocks`);
* the disk is 0.32's `kv_offload/tiering/manager.py` in outline (what is stored on the host goes on to the disk; what is
  only there is brought to the host first, and the request asks again later), but knows at once what it holds, and a
  promotion is whole or none.

Ours, because the connector's worker decides it by CUDA events: a store is sent when the step that fills its blocks has
run, and a load when its request is scheduled; each is seen by the first schedule() call after it has ended. A request
brings blocks from the disk once per admission, so that a small host cannot make it do so for ever. The disk is bounded,
LRU; vLLM's is not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile

from kvtwin.sim.links import Link, LinkTimes
from kvtwin.sim.vllm.block_pool import IntArray, Pool
from kvtwin.sim.vllm.cache_log import HBM, HOST, STORAGE, CacheLog
from kvtwin.sim.vllm.config import VllmRules
from kvtwin.sim.vllm.recorder import UNKNOWN, RequestTimes
from kvtwin.sim.vllm.request import Request


@dataclass(slots=True)
class _Held:
    """A block of a level.

    Attributes:
        rank: when it was last wanted; the smallest goes first.
        is_ready: whether its content is there.
        num_readers: how many transfers read it.
        is_queued: whether it has its entry in the level's queue.
    """

    rank: int
    is_ready: bool = False
    num_readers: int = 0
    is_queued: bool = False

    @property
    def is_evictable(self) -> bool:
        return self.is_ready and not self.num_readers


class Level:
    """Blocks by key, least recently used first (0.19.0 `CPUOffloadingManager` with `LRUCachePolicy`).

    The queue holds every block that may go, by a rank that may be too small: ranks only grow, so a block that was
    wanted since finds its place when its turn comes.

    Args:
        num_blocks: what it holds.
        on_evict: told of each key that is dropped.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks, self._on_evict = num_blocks, on_evict
        self._held: dict[int, _Held] = {}
        self._queue: list[tuple[int, int]] = []  # heap: rank, key
        self._rank = 0
        self._num_evictable = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: int) -> bool:
        return key in self._held

    def is_ready(self, key: int) -> bool:
        """Whether the block can be read."""
        held = self._held.get(key)
        return held is not None and held.is_ready

    def touch(self, keys: Sequence[int]) -> None:
        """They are wanted: a prefix's first block is the last to go."""
        get, rank = self._held.get, self._rank
        for key in reversed(keys):
            if (held := get(key)) is not None:
                rank += 1
                held.rank = rank
        self._rank = rank

    def prepare_store(self, keys: Iterable[int], spared: Iterable[int] = ()) -> list[int] | None:
        """Make room for those that are not there, neither the others nor `spared` going; returns these, or None where
        blocks in use leave too little room."""
        asked = dict.fromkeys(keys)
        wanted = [key for key in asked if key not in self._held]
        short = len(wanted) - (self.num_blocks - len(self._held))
        if short > 0 and not self._evict(short, {*asked, *spared}):
            return None
        for key in wanted:
            self._rank += 1
            self._held[key] = _Held(self._rank)
        return wanted

    def _evict(self, count: int, spared: Container[int]) -> bool:
        """Drop the `count` least recently used that may go; False, with nothing dropped, if there are fewer."""
        if count > self._num_evictable:
            return False
        victims: list[int] = []
        kept: list[tuple[int, int]] = []
        while self._queue and len(victims) < count:
            rank, key = heappop(self._queue)
            held = self._held[key]
            if not held.is_evictable:
                held.is_queued = False
            elif held.rank > rank:
                heappush(self._queue, (held.rank, key))
            elif key in spared:
                kept.append((rank, key))
            else:
                victims.append(key)
        enough = len(victims) == count
        for entry in kept if enough else [*kept, *((self._held[key].rank, key) for key in victims)]:
            heappush(self._queue, entry)
        for key in victims if enough else ():
            del self._held[key]
            self._on_evict(key)
        self._num_evictable -= len(victims) if enough else 0
        return enough

    def complete_store(self, keys: Iterable[int]) -> None:
        """Their content is there."""
        for key in keys:
            held = self._held[key]
            if not held.is_ready:
                held.is_ready = True
                self._may_go(key, held)

    def read(self, keys: Iterable[int]) -> None:
        """A transfer reads them: they stay until `read_done`."""
        for key in keys:
            held = self._held[key]
            self._num_evictable -= held.is_evictable
            held.num_readers += 1

    def read_done(self, keys: Iterable[int]) -> None:
        """The transfer has ended."""
        for key in keys:
            held = self._held[key]
            held.num_readers -= 1
            self._may_go(key, held)

    def _may_go(self, key: int, held: _Held) -> None:
        if held.is_evictable:
            self._num_evictable += 1
            if not held.is_queued:
                held.is_queued = True
                heappush(self._queue, (held.rank, key))

    def check_invariants(self) -> None:
        """INV-TIER: never more than it holds, no reader of what is not there, whoever may go is in the queue once."""
        assert len(self._held) <= self.num_blocks
        evictable = {key for key, held in self._held.items() if held.is_evictable}
        assert len(evictable) == self._num_evictable
        assert all(held.num_readers == 0 or (held.is_ready and held.num_readers > 0) for held in self._held.values())
        queued = [key for _, key in self._queue]
        assert len(queued) == len(set(queued))
        assert evictable <= set(queued) == {key for key, held in self._held.items() if held.is_queued}


class OffloadTiers:
    """Host and disk, and the transfers between them and the GPU.

    Args:
        num_host_blocks, num_disk_blocks: what they hold; 0 for no disk.
        block_size: tokens per block.
        rules: of the vLLM version.
        links: what transfers take; a page is a block.
        d2h, h2d: the links between device and host.
        pool: the GPU's blocks; those of a finished request are freed when its stores have ended.
        times: told of the requests' hits and waiting for transfers.
        log: told of every block that moves.

    Attributes:
        host, disk: what they hold.
    """

    def __init__(
        self,
        num_host_blocks: int,
        num_disk_blocks: int,
        block_size: int,
        rules: VllmRules,
        links: LinkTimes,
        d2h: Link,
        h2d: Link,
        pool: Pool,
        times: RequestTimes,
        log: CacheLog | None,
    ) -> None:
        self.host = Level(num_host_blocks, lambda key: self._note(HOST, "evict", (key,)))
        self.disk = Level(num_disk_blocks, lambda key: self._note(STORAGE, "evict", (key,)))
        self._touches, self._waits = rules.offload_touches_when_asked, rules.offload_waits_for_writes
        self._block_size, self._d2h, self._h2d, self._pool = block_size, d2h, h2d, pool
        self._read = Link(links.read_base, links.read_per_page)
        self._write = Link(links.write_base, links.write_per_page)
        self._times, self._log = times, log
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[[int], None]]] = []  # heap: end, order, what happens then
        self._num_events = 0
        self._num_stored: dict[int, int] = {}  # by row: blocks that have been sent to the host, or come from it
        self._stores_end_ns: dict[int, int] = {}  # by row: when the last of its stores ends
        self._arriving: set[int] = set()  # rows whose blocks are on their way to the GPU
        self._loading: set[int] = set()  # the keys of these blocks
        self._promoting: dict[int, int] = {}  # by row: when what the disk holds for it is on the host
        self._promoted: dict[int, set[int]] = {}  # by row: keys that it brought from the disk for its next admission

    # --- time ------------------------------------------------------------------------------------------------------

    def next_ns(self) -> int | None:
        """When the next transfer ends."""
        return self._events[0][0] if self._events else None

    def advance(self, now_ns: int) -> None:
        """See what has ended by now. Events of the log have the times at which things happen, not are seen."""
        self._now_ns = now_ns
        while self._events and self._events[0][0] <= now_ns:
            end_ns, _, action = heappop(self._events)
            self._tell_time(end_ns)
            action(end_ns)
        self._tell_time(now_ns)

    def drain(self) -> None:
        """The last request has finished: let the transfers end."""
        while self._events:
            self.advance(self._events[-1][0])

    def _tell_time(self, time_ns: int) -> None:
        if self._log is not None:
            self._log.now_ns = time_ns

    def _at(self, end_ns: int, action: Callable[[int], None]) -> None:
        heappush(self._events, (end_ns, self._num_events, action))
        self._num_events += 1

    def _note(self, level: int, kind: str, keys: Iterable[int], row: int = UNKNOWN) -> None:
        if self._log is not None:
            self._log.blocks(level, kind, keys, row)

    # --- loads -----------------------------------------------------------------------------------------------------

    def is_fetching(self, request: Request) -> bool:
        """Whether blocks are on their way to the GPU, or to the host, for a waiting request."""
        return request.row in self._arriving or self._promoting.get(request.row, 0) > self._now_ns

    def lookup(self, request: Request, num_local_blocks: int) -> int | None:
        """Blocks that the host has ready beyond the GPU's hit; None while the disk brings more, while some of them are
        on their way for another request, which will leave them on the GPU, or (0.32) while the next is being written.

        Args:
            request: waits for its admission.
            num_local_blocks: the GPU's hit.
        """
        keys: list[int] = request.block_keys(0, request.num_tokens // self._block_size).tolist()
        if self._touches:
            self.host.touch(keys)
        beyond = keys[num_local_blocks:]
        hits = sum(1 for _ in takewhile(self.host.is_ready, beyond))
        if self._waits and hits < len(beyond) and beyond[hits] in self.host:
            return None
        if request.row not in self._promoted and self._promote(request, beyond[:hits], beyond[hits:]):
            return None
        return None if self._loading and not self._loading.isdisjoint(beyond[:hits]) else hits

    def _promote(self, request: Request, hits: list[int], keys: list[int]) -> bool:
        """Bring the blocks that the disk holds next to the host, behind the hits there, which stay; False if there are
        none or there is no room."""
        found = list(takewhile(lambda key: self.disk.is_ready(key) and key not in self.host, keys))
        if not found or self.host.prepare_store(found, hits) is None:
            return False
        self.disk.touch(found)
        self.disk.read(found)
        start_ns, row = self._now_ns, request.row
        end_ns = self._read.send(start_ns, len(found))
        self._promoting[row], self._promoted[row] = end_ns, set(found)
        self._times.prefetch[row] += end_ns - start_ns
        self._note(STORAGE, "prefetch_start", found, row)
        self._at(end_ns, lambda _: self._promotion_done(row, found))
        return True

    def _promotion_done(self, row: int, keys: list[int]) -> None:
        self.disk.read_done(keys)
        self.host.complete_store(keys)
        self._note(STORAGE, "prefetch_done", keys, row)

    def start_load(self, request: Request, num_local_blocks: int, num_blocks: int) -> None:
        """Copy blocks of the host to those that the request has been given on the GPU."""
        row, start_ns = request.row, self._now_ns
        last = num_local_blocks + num_blocks
        keys: list[int] = request.block_keys(num_local_blocks, last).tolist()
        self.host.read(keys)
        self._arriving.add(row)
        self._loading.update(keys)
        self._num_stored[row] = last
        end_ns = self._h2d.send(start_ns, num_blocks * self._block_size)
        self._times.prefetch[row] += end_ns - start_ns
        promoted = self._promoted.get(row, set())
        num_tokens = min(last * self._block_size, request.num_tokens - 1) - num_local_blocks * self._block_size
        from_disk = min(num_tokens, self._block_size * sum(key in promoted for key in keys))
        self._times.note_load(row, num_tokens - from_disk, from_disk)
        self._at(end_ns, lambda _: self._load_done(row, keys))

    def _load_done(self, row: int, keys: list[int]) -> None:
        self._arriving.discard(row)
        self._loading.difference_update(keys)
        self.host.read_done(keys)
        self._note(HBM, "load_back", keys, row)

    def admitted(self, request: Request) -> None:
        """It runs: should it come back, it may ask the disk again."""
        self._promoting.pop(request.row, None)
        self._promoted.pop(request.row, None)

    def released(self, request: Request) -> None:
        """It has given up the blocks that it fetched, and waits anew."""
        self._times.note_load(request.row, 0, 0)
        self.admitted(request)

    # --- stores ----------------------------------------------------------------------------------------------------

    def store(self, requests: Sequence[Request], end_ns: int) -> None:
        """Send the blocks to the host that a step fills, once it has run.

        Args:
            requests: the step's batch.
            end_ns: when the step ends.
        """
        for request in requests:
            # Tokens in flight are not known yet, so neither are the keys of their blocks.
            num_blocks = min(request.num_computed_tokens, request.num_tokens) // self._block_size
            first = self._num_stored.get(request.row, 0)
            if first < num_blocks:
                self._store_blocks(request, first, num_blocks, end_ns)

    def _store_blocks(self, request: Request, first: int, last: int, end_ns: int) -> None:
        row = request.row
        keys = self.host.prepare_store(request.block_keys(first, last).tolist())
        if keys is None:  # tried again with its next step
            return
        self._num_stored[row] = last
        if not keys:
            return
        if self._touches:
            self.host.touch(request.block_keys(0, last).tolist())
        stored_ns = self._d2h.send(end_ns, len(keys) * self._block_size)
        self._stores_end_ns[row] = stored_ns
        self._at(stored_ns, lambda time_ns: self._store_done(keys, time_ns))

    def _store_done(self, keys: list[int], time_ns: int) -> None:
        self.host.complete_store(keys)
        self._note(HOST, "store", keys)
        going_on = self.disk.prepare_store(keys) if self.disk.num_blocks else None
        if going_on:
            self.host.read(going_on)
            written_ns = self._write.send(time_ns, len(going_on))
            self._at(written_ns, lambda _: self._write_done(going_on))

    def _write_done(self, keys: list[int]) -> None:
        self.host.read_done(keys)
        self.disk.complete_store(keys)
        self._note(STORAGE, "store", keys)

    def stores_end_ns(self, request: Request) -> int:
        """When the blocks of a preempted request may be written again (`handle_preemptions` waits for that)."""
        return self._stores_end_ns.get(request.row, 0)

    def finished(self, request: Request) -> bool:
        """A request has finished; whether its GPU blocks stay until its stores have ended (`request_finished`)."""
        row, blocks = request.row, request.blocks
        num_stored = self._num_stored.pop(row, 0)
        if not self._touches:
            self.host.touch(request.block_keys(0, num_stored).tolist())
        self.admitted(request)
        end_ns = self._stores_end_ns.pop(row, 0)
        if end_ns <= self._now_ns or not len(blocks):
            return False
        self._at(end_ns, lambda _: self._free(blocks))
        return True

    def _free(self, blocks: IntArray) -> None:
        self._pool.free(blocks)
