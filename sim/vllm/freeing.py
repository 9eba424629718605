"""When the KV blocks of a request go back to the pool.

With a KV connector and two batches in flight, a step on the device may still write blocks of a request that is gone,
while a load fills them for another: 0.32 holds them back until that step has been taken in
(`Scheduler.defer_block_free`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.kv_manager import KVCacheManager
from kvtwin.sim.vllm.request import NO_BLOCKS, Request


class Freeing:
    """Gives blocks back.

    Args:
        kv: what gave them out.
        waits: whether they are held back as long as they may be written.
    """

    def __init__(self, kv: KVCacheManager, *, waits: bool) -> None:
        self.kv, self._waits = kv, waits
        self._num_scheduled = self._num_taken_in = 0  # steps
        self._held_back: deque[tuple[int, IntArray]] = deque()  # after which step, blocks

    def step_scheduled(self, requests: Iterable[Request]) -> None:
        """A step will write the blocks of these requests."""
        if self._waits:
            self._num_scheduled += 1
            for request in requests:
                request.last_step = self._num_scheduled

    def step_taken_in(self) -> None:
        """The oldest step has run."""
        if self._waits:
            self._num_taken_in += 1
            while self._held_back and self._held_back[0][0] <= self._num_taken_in:
                self.kv.pool.free(self._held_back.popleft()[1])

    def is_possible(self, request: Request) -> bool:
        """Whether its blocks would be free at once (`_request_blocks_can_be_freed`)."""
        return not self._waits or request.last_step <= self._num_taken_in

    def free(self, request: Request) -> None:
        """Take all blocks from a finished or preempted request (`_free_request_blocks`)."""
        if self.is_possible(request):
            self.kv.free(request)
            return
        self._held_back.append((self._num_scheduled, request.blocks))
        request.blocks = NO_BLOCKS
        request.num_cached_blocks = 0
