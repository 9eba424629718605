"""A simulated vLLM cache whose hits are the recorded ones."""

from __future__ import annotations

import numpy as np

from kvtwin.sim.latency.stats import IntArray
from kvtwin.sim.vllm.kv_manager import KVCacheManager
from kvtwin.sim.vllm.request import Request


class RecordedHits(KVCacheManager):
    """Each request hits at its first admission what it hit in the recording.

    Hits beyond the recorded ones are passed over. Where the simulated cache holds less, the missing blocks are put
    into it first: they take free blocks, as they did in the recorded engine, where they held them already.
    """

    def __init__(self, manager: KVCacheManager, num_blocks: IntArray) -> None:
        vars(self).update(vars(manager))
        self._num_recorded = num_blocks
        self._admitted: set[int] = set()

    def computed_blocks(self, request: Request) -> IntArray:
        """See `KVCacheManager.computed_blocks`."""
        hits = super().computed_blocks(request)
        if request.row in self._admitted:
            return hits
        wanted = int(self._num_recorded[request.row])
        missing = wanted - len(hits)
        if 0 < missing <= self.pool.num_free - self.pool.num_unreferenced(hits):
            self.pool.touch(hits)
            blocks = self.pool.allocate(missing)
            self.pool.cache(blocks, request.block_keys(len(hits), wanted))
            self.pool.free(np.concatenate((hits, blocks)))
            hits = super().computed_blocks(request)
        return hits[:wanted]

    def admit(self, request: Request, hits: IntArray) -> None:
        """See `KVCacheManager.admit`."""
        self._admitted.add(request.row)
        super().admit(request, hits)
