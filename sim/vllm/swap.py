"""Swap-based preemption: the victim's KV waits in host memory instead of being computed again.

vLLM V1 always recomputes; this is V0's option, after 0.5 `core/scheduler.py` (`_preempt_by_swap`, `_schedule_swapped`)
and `worker/worker.py` (`execute_worker`: the copies of a step run before its model, so the step waits for them). Beside
0.6.6 it differs: that one's swapped queue is first in, first out, chunked prefill goes on while some are swapped, and a
swap-in always leaves the watermark (0.01) free.
"""

from __future__ import annotations

from kvtwin.sim.links import Link
from kvtwin.sim.vllm.cache_log import HBM, HOST, CacheLog
from kvtwin.sim.vllm.request import Request


class SwapSpace:
    """Host memory for the KV of preempted requests, and the copies of the step that is being decided.

    Where V0 aborts for want of swap space, the victim is recomputed.

    Args:
        num_blocks: what it holds.
        block_size: tokens per block.
        d2h, h2d: the links to the host and back.
        log: told of the copies.

    Attributes:
        num_free: blocks left.
    """

    def __init__(self, num_blocks: int, block_size: int, d2h: Link, h2d: Link, log: CacheLog | None) -> None:
        self.num_free = num_blocks
        self._block_size, self._d2h, self._h2d, self._log = block_size, d2h, h2d, log
        self._held: dict[int, int] = {}  # blocks, by row
        self._tokens_out = self._tokens_in = 0

    def take(self, request: Request) -> bool:
        """Swap a running request out; False if there is no room."""
        num_blocks = -(-request.num_computed_tokens // self._block_size)
        if num_blocks > self.num_free:
            return False
        self.num_free -= num_blocks
        self._held[request.row] = num_blocks
        self._tokens_out += request.num_computed_tokens
        if self._log is not None:
            self._log.tokens(HOST, "write_back", request.num_computed_tokens, request.row)
        return True

    def give_back(self, request: Request) -> None:
        """Swap it in again: the step that is being decided runs it."""
        self.drop(request)
        self._tokens_in += request.num_computed_tokens
        if self._log is not None:
            self._log.tokens(HBM, "load_back", request.num_computed_tokens, request.row)

    def drop(self, request: Request) -> None:
        """It has finished with the token that was in flight."""
        self.num_free += self._held.pop(request.row)

    def copy(self, start_ns: int) -> int:
        """Run the copies that the last schedule() call asked for, from `start_ns`; returns when the device may go on.

        What goes out makes room for what the step needs, and for what comes in.
        """
        if self._tokens_out:
            start_ns = self._d2h.send(start_ns, self._tokens_out)
        if self._tokens_in:
            start_ns = self._h2d.send(start_ns, self._tokens_in)
        self._tokens_out = self._tokens_in = 0
        return start_ns
