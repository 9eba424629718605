"""HiCache's third level: the threads that read and write storage, as events."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvtwin.sim.links import Link, LinkTimes
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.runs import Runs, cut
from kvtwin.sim.sglang.storage_index import StorageIndex, StorageLimit

# Pages of one query, read or write (`HiCacheController.storage_batch_size`).
_BATCH_PAGES: Final = 128


@dataclass(slots=True, eq=False)
class Prefetch:
    """A read of storage on behalf of a waiting request.

    Attributes:
        request: the request.
        key, start, num_tokens: what is asked for: `num_tokens` of the key from `start` on.
        node: the host node below which they belong; protected meanwhile.
        start_ns, start_s: when it was asked; `start_s` as SGLang's clock reads.
        hit_tokens: how many storage holds; 0 until it has answered.
        completed: tokens read.
        terminated: the scheduler has ended it.
        failed: storage has dropped a page between its answer and the read, so that no more comes.
    """

    request: SglangRequest
    key: Runs
    start: int
    num_tokens: int
    node: TreeNode
    start_ns: int
    start_s: float
    hit_tokens: int = 0
    completed: int = 0
    terminated: bool = False
    failed: bool = False
    _ended: bool = False

    def end(self, time_ns: int) -> None:
        """Storage works for it no longer, or its request no longer waits for that."""
        if not self._ended:
            self._ended = True
            self.request.prefetch_ns = time_ns - self.start_ns


@dataclass(slots=True, eq=False)
class _Backup:
    """A write of a node's pages.

    Attributes:
        node, parent: the node, and the one above it: wherever they are cut later, their ends stay.
        runs, length: its tokens when the write was asked for.
        reached: how far storage's index has them by now.
    """

    node: TreeNode
    parent: TreeNode
    runs: Runs
    length: int
    reached: TreeNode | None = None


@dataclass(slots=True)
class Messages:
    """What the threads have told the scheduler, which reads it when it polls."""

    revoked: list[int] = field(default_factory=list)
    backed_up: list[TreeNode] = field(default_factory=list)
    released_tokens: int = 0


class StorageThreads:
    """The prefetch thread (queries), its I/O thread (reads) and the backup thread (writes), each FIFO.

    Args:
        clock: virtual time.
        times: what each operation takes.
        page_size: tokens per page.
        threshold: fewer hits than this many tokens are not worth reading.
        limit: how much storage may hold.
        observer: a function that returns who hears of it.
    """

    def __init__(
        self,
        clock: Clock,
        times: LinkTimes,
        page_size: int,
        threshold: int,
        limit: StorageLimit,
        observer: Callable[[], CacheObserver],
    ) -> None:
        self._clock, self._times, self._page_size, self._threshold = clock, times, page_size, threshold
        self._observer = observer
        self.index = StorageIndex(
            page_size, limit, lambda time_ns, tokens: observer().dropped_from_storage(time_ns, tokens)
        )
        self.messages = Messages()
        self._queries = Link(times.query_base, times.query_per_page)
        self._write_free_ns = 0
        self._reading: deque[Prefetch] = deque()
        self._events: list[tuple[int, int, Callable[[int], None]]] = []
        self._serial = 0
        self._reached_ns = 0

    def advance(self, time_ns: int) -> None:
        """Let everything happen up to a time. What is asked for at that very time happens later."""
        if time_ns <= self._reached_ns:
            return
        self._reached_ns = time_ns
        while self._events and self._events[0][0] <= time_ns:
            event_ns, _, happen = heapq.heappop(self._events)
            happen(event_ns)

    def next_event_ns(self) -> int | None:
        """When the next operation after now ends."""
        now_ns = self._clock.now_ns
        return min((time_ns for time_ns, _, _ in self._events if time_ns > now_ns), default=None)

    def _at(self, time_ns: int, happen: Callable[[int], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time_ns, self._serial, happen))

    def prefetch(self, operation: Prefetch) -> None:
        """Ask storage for a prefetch's pages."""
        self.advance(self._clock.now_ns)
        end_ns = self._queries.send(self._clock.now_ns, operation.num_tokens // self._page_size)
        self._at(end_ns, lambda time_ns: self._answered(operation, time_ns))

    def _answered(self, operation: Prefetch, time_ns: int) -> None:
        end = operation.start + operation.num_tokens
        hit = self.index.count(operation.key, operation.start, end)
        if hit < self._threshold:
            operation.end(time_ns)
            self.messages.revoked.append(operation.request.row)
            self.messages.released_tokens += operation.num_tokens
            self._observer().prefetch_revoked(operation.request.row, time_ns, hit)
            return
        operation.hit_tokens = hit
        self.messages.released_tokens += operation.num_tokens - hit
        self._observer().prefetch_hit(operation.request.row, time_ns, hit)
        self._reading.append(operation)
        if len(self._reading) == 1:
            self._read(operation, 0, time_ns)

    def _read(self, operation: Prefetch, first_page: int, time_ns: int) -> None:
        pages = min(operation.hit_tokens // self._page_size - first_page, _BATCH_PAGES)
        end_ns = time_ns + round(self._times.read_base + pages * self._times.read_per_page)
        self._at(end_ns, lambda now_ns: self._was_read(operation, first_page + pages, pages, now_ns))

    def _was_read(self, operation: Prefetch, next_page: int, pages: int, time_ns: int) -> None:
        stopped = operation.terminated
        if not stopped:
            first = operation.start + operation.completed
            num_read = self.index.read(operation.key, first, first + pages * self._page_size)
            operation.completed += num_read
            operation.failed = num_read < pages * self._page_size
            if operation.completed < operation.hit_tokens and not operation.failed:
                self._read(operation, next_page, time_ns)
                return
        operation.end(time_ns)
        self.messages.released_tokens += operation.hit_tokens - operation.completed
        self._observer().prefetch_read(operation.request.row, time_ns, operation.completed, stopped)
        self._reading.popleft()
        if self._reading:
            self._read(self._reading[0], 0, time_ns)

    def backup(self, node: TreeNode) -> None:
        """Write a node's pages to storage."""
        self.advance(self._clock.now_ns)
        assert node.parent is not None
        backup, length = _Backup(node, node.parent, node.runs, node.length), node.length
        batch = _BATCH_PAGES * self._page_size
        time_ns = max(self._clock.now_ns, self._write_free_ns)
        for first in range(0, length, batch):
            last = min(first + batch, length)
            pages = (last - first) // self._page_size
            time_ns += round(self._times.write_base + pages * self._times.write_per_page)
            self._at(time_ns, lambda now_ns, first=first, last=last: self._written(backup, first, last, now_ns))  # type: ignore[misc]
        self._write_free_ns = time_ns
        self._at(time_ns, lambda _: self._backed_up(backup))

    def _written(self, backup: _Backup, first: int, last: int, time_ns: int) -> None:
        above = backup.reached or backup.parent.stored or self.index.reach(backup.parent.key(), backup.parent.end)
        runs = cut(backup.runs, first, last) if first or last < backup.length else backup.runs
        backup.reached = self.index.put(above, runs, last - first, time_ns)

    def _backed_up(self, backup: _Backup) -> None:
        backup.node.stored = backup.reached
        self.messages.backed_up.append(backup.node)
