"""Who of the waiting requests runs next: the second half of `Scheduler.schedule`.

With KV tiers, a waiting request may first fetch blocks from the host (`WAITING_FOR_REMOTE_KVS`), and is passed over
meanwhile; so is one whose token from before its preemption is still to come.
"""

from __future__ import annotations

from enum import Enum, auto

from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.kv_manager import KVCacheManager, ceil_div
from kvtwin.sim.vllm.offload.connector import Connector
from kvtwin.sim.vllm.plan import Call
from kvtwin.sim.vllm.queues import WaitingQueue, waiting_queue
from kvtwin.sim.vllm.request import NO_BLOCKS, Request, RequestBook, Status


class _Outcome(Enum):
    ADMITTED = auto()
    PASSED_OVER = auto()
    REFUSED = auto()  # and nobody behind it is tried


class Admission:
    """The waiting requests, and the rules by which they get in.

    Args:
        config: the engine's settings; `config.rules` holds what differs between versions.
        requests: what the rows stand for.
        kv: gives out the blocks.
        offload: the levels below them, if there are any.

    Attributes:
        waiting: rows that wait.
        held: rows that were passed over, which go first: all of them (0.19), or those that hold blocks (0.32).
    """

    def __init__(
        self, config: VllmConfig, requests: RequestBook, kv: KVCacheManager, offload: Connector | None
    ) -> None:
        self._config, self._rules, self._requests, self.kv = config, config.rules, requests, kv
        self._offload = offload
        self.waiting = waiting_queue(config, requests)
        self.held = waiting_queue(config, requests)
        self._prefilling: dict[Request, None] = {}  # that hold blocks and need more of them for their prompts

    def __len__(self) -> int:
        return len(self.waiting) + len(self.held)

    def schedule(self, call: Call, running: list[Request]) -> None:
        """Admit waiting requests, in order, while the budget and the blocks last; they join `running`."""
        passed_over: list[tuple[WaitingQueue, int]] = []
        while call.budget > 0 and len(running) < self._config.max_num_seqs and len(self):
            queue = self._next_queue()
            request = self._requests[queue[0]]
            outcome = self._try(request, call, running)
            if outcome is _Outcome.REFUSED:
                break
            queue.popleft()
            if outcome is _Outcome.PASSED_OVER:
                passed_over.append((self._queue_of(request), request.row))
        for queue, row in reversed(passed_over):
            queue.appendleft(row)

    def _next_queue(self) -> WaitingQueue:
        if not self.held or not self.waiting:
            return self.held or self.waiting
        if self._config.policy == "fcfs" or not self._rules.has_skipped_queue:
            return self.held
        first = min(self.waiting[0], self.held[0], key=self._requests.urgency)  # `_select_waiting_queue_for_scheduling`
        return self.waiting if first == self.waiting[0] else self.held

    def _queue_of(self, request: Request) -> WaitingQueue:
        holds_blocks = request.num_computed_tokens > 0 or request.status is Status.FETCHING
        return self.held if holds_blocks or self._rules.has_skipped_queue else self.waiting

    def _try(self, request: Request, call: Call, running: list[Request]) -> _Outcome:
        if request.status is Status.FETCHING:
            if self._offload is None or self._offload.is_arriving(request):
                return _Outcome.PASSED_OVER
            self.kv.loaded(request)
            request.status = Status.WAITING
        if request.num_stale_output_tokens:
            # Its token from before the preemption is still to come: resuming now could sample it twice.
            return _Outcome.PASSED_OVER
        hits = NO_BLOCKS
        if not len(request.blocks):
            hits = self.kv.computed_blocks(request)
            if self._offload is not None:
                num_blocks = self._offload.lookup(request, len(hits))
                if num_blocks is None:
                    return _Outcome.PASSED_OVER
                if num_blocks:
                    return self._fetch(request, hits, num_blocks, call, running, self._offload)
        return self._admit(request, hits, call, running)

    def _fetch(
        self,
        request: Request,
        hits: IntArray,
        num_blocks: int,
        call: Call,
        running: list[Request],
        offload: Connector,
    ) -> _Outcome:
        """Give a request the blocks that it hit, and those that the host's content goes to."""
        reserved = sum(map(self._num_lacking, self._prefilling)) if self._rules.reserves_for_loads else 0
        if not self.kv.can_admit(
            request,
            num_blocks * self._config.block_size,
            hits,
            whole_sequence=self._config.scheduler_reserve_full_isl,
            watermark=bool(running),
            num_reserved=reserved,
        ):
            return _Outcome.REFUSED
        self.kv.admit(request, hits)
        self.kv.reserve(request, num_blocks)
        call.allocated[request] = request.blocks
        offload.start_load(request, len(hits), num_blocks)
        request.status = Status.FETCHING
        self._prefilling[request] = None
        return _Outcome.PASSED_OVER

    def _num_lacking(self, request: Request) -> int:
        """Blocks that it still needs for all its known tokens (`_request_remaining_blocks`)."""
        num_tokens = min(request.num_tokens, self._config.max_model_len)
        return max(0, ceil_div(num_tokens, self._config.block_size) - len(request.blocks))

    def _admit(self, request: Request, hits: IntArray, call: Call, running: list[Request]) -> _Outcome:
        num_cached = request.num_computed_tokens or len(hits) * self._config.block_size
        num_new_tokens = call.cut(request.num_tokens - num_cached)
        if num_new_tokens > call.budget and not self._config.enable_chunked_prefill:
            return _Outcome.REFUSED
        num_new_tokens = min(num_new_tokens, call.budget)
        whole, watermark = self._config.scheduler_reserve_full_isl, bool(running)
        has_fetched = len(request.blocks) > 0
        if has_fetched:
            fits = self.kv.can_resume(request, num_new_tokens, whole_sequence=whole, watermark=watermark)
        else:
            fits = self.kv.can_admit(request, num_new_tokens, hits, whole_sequence=whole, watermark=watermark)
        if not fits:
            return _Outcome.REFUSED
        if not has_fetched:
            self.kv.admit(request, hits)
        self.kv.grow(request, num_new_tokens)
        request.status = Status.RUNNING
        running.append(request)
        call.take(request, num_new_tokens)
        if self._offload is not None:
            call.allocated[request] = request.blocks
            self._offload.admitted(request)
            if request.num_computed_tokens + num_new_tokens < request.num_tokens:
                self._prefilling[request] = None
        return _Outcome.ADMITTED

    def prompt_done(self, request: Request) -> None:
        """It prefills no longer: its prompt is computed, or it has lost its blocks."""
        self._prefilling.pop(request, None)

    def remove(self, row: int) -> None:
        """A request has finished while waiting: its last token was in flight when it was preempted."""
        for queue in (self.waiting, self.held):
            if row in queue:
                queue.remove(row)
