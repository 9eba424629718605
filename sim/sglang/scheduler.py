"""SGLang's scheduler, 0.5.6.post2 and 0.5.9, decision for decision.

Follows `managers/scheduler.py` (`get_next_batch_to_run`, `get_new_batch_prefill`, `update_running_batch`,
`_add_request_to_queue`), `managers/schedule_batch.py` (`prepare_for_extend`, `prepare_for_decode`, `retract_decode`,
`check_decode_mem`, `mix_with_running`) and `scheduler_output_processor_mixin.py` (`process_batch_result_*`). Prefill
goes first: as long as a prefill batch can be formed, decodes wait.

Not modelled, because no supported setting reaches it: speculative decoding, LoRA, grammars, data-parallel attention,
disaggregation, sliding windows.
"""

from __future__ import annotations

from typing import Any, Final

from kvtwin.sim.sglang.batch import DECODE, EXTEND, MIXED, Batch
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.policy import SchedulePolicy
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.prefill_adder import AddReqResult, PrefillAdder
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.traces.errors import KvtwinError

# SGLANG_INIT_NEW_TOKEN_RATIO, SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR, SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS and
# SGLANG_RETRACT_DECODE_STEPS.
_INIT_RATIO: Final = 0.7
_MIN_RATIO_FACTOR: Final = 0.14
_DECAY_STEPS: Final = 600
_RETRACT_DECODE_STEPS: Final = 20


class UpstreamStopError(KvtwinError):
    """SGLang itself would raise here and its server would end."""


class SglangScheduler:
    """Decides, at each step, who runs with how many tokens.

    Args:
        config: the server's settings; `config.rules` holds what differs between versions.
        pool: the device's KV slots.
        cache: prefix cache over the pool (`KvCache`, or `HostKvCache` with enable_hierarchical_cache).

    Attributes:
        waiting: the waiting queue, in its current order.
        running: the running requests, in batch order; finished ones stay until the next filter.
        batch_is_full: no prefill is tried before a running request ends.
        new_token_ratio: share of the remaining outputs that an admission holds free.
        chunked: the request whose prefill is under way.
    """

    def __init__(self, config: SglangConfig, pool: KvPool, cache: Any) -> None:
        self.config, self.pool, self.cache, self._rules = config, pool, cache, config.rules
        self._policy = SchedulePolicy(config, cache)
        self._has_host = config.enable_hierarchical_cache
        self._has_storage = bool(config.hicache_storage_backend)
        self._preempts = config.enable_priority_scheduling
        self.waiting: list[SglangRequest] = []
        self.running: list[SglangRequest] = []
        self.batch_is_full = False
        self.chunked: SglangRequest | None = None
        self.last_batch: Batch | None = None
        self.init_ratio = min(_INIT_RATIO * config.schedule_conservativeness, 1.0)
        self.min_ratio = min(self.init_ratio * _MIN_RATIO_FACTOR, 1.0)
        self.ratio_decay = (self.init_ratio - self.min_ratio) / _DECAY_STEPS
        self.new_token_ratio = self.init_ratio
        self.requeued: list[SglangRequest] = []
        self._num_entries = 0
        self._some_finished = False

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running or self.chunked)

    def only_decodes(self) -> bool:
        """Whether the next batch decodes those that decoded last, and no prefill is even tried."""
        last = self.last_batch
        if last is None or last.requests is not self.running or self.chunked is not None or self._some_finished:
            return False
        return not self.waiting or (self.batch_is_full and not self._preempts)

    def prepare_preemption(self) -> None:
        """Where requests can be preempted, a full batch is no reason not to try (at every step)."""
        if self._preempts:
            self.batch_is_full = False

    def add(self, request: SglangRequest) -> None:
        """Append a request to the waiting queue (`_add_request_to_queue`)."""
        if request.num_retractions:
            self.requeued.append(request)
        if self._has_storage:
            self._init_next_round(request)
            self.cache.prefetch(request)
        self.waiting.append(request)
        self._num_entries += 1
        request.queue_entry = self._num_entries

    def note_idle(self) -> None:
        """Nothing ran (`self_check_during_idle`).

        Raises:
            UpstreamStopError: slots are counted twice, as write_back can leave them (`HiRadixTree.load_back`).
        """
        free, cached = self.pool.available, self.cache.evictable_size() + self.cache.protected_size()
        if free + cached != self.pool.size:
            raise UpstreamStopError(
                f"memory leak detected: {free} free and {cached} cached of {self.pool.size} tokens: SGLang stops here"
            )
        self.new_token_ratio = self.init_ratio

    def next_batch(self) -> Batch | None:
        """Form the next batch: a prefill if one can be formed, else the running requests' decode."""
        exclude = []
        if self.chunked is not None:
            exclude.append(self.chunked)
            self.cache.cache_unfinished_req(self.chunked, chunked=True)
        last = self.last_batch
        if last is not None and last.mode != DECODE:
            if last.chunked is not None:
                exclude.append(last.chunked)
            self._merge(last, exclude)
        batch = self._new_prefill()
        if batch is None and self.running:
            batch = self._decode()
        self.last_batch = batch
        return batch

    def _merge(self, last: Batch, exclude: list[SglangRequest]) -> None:
        """The last prefill's requests join the running ones."""
        kept = [request for request in last.requests if not request.finished and request not in exclude]
        if len(kept) < len(last.requests):
            self.batch_is_full = False
        if not kept:
            return
        if self.running:
            self.running = self.running + kept
        else:
            # Upstream puts the last batch in the running one's place: a set flag is lost with it.
            self.running = kept
            self.batch_is_full = False

    def _init_next_round(self, request: SglangRequest, *, match: bool = True) -> None:
        """Cover all known tokens; at least one is left to compute (`Req.init_next_round_input`)."""
        request.fill_len = request.num_tokens
        request.loaded_len = 0
        if match:
            self.cache.match(request, request.fill_len - 1)
            request.cache_protected_len = request.prefix_len
        request.extend_input_len = request.fill_len - request.prefix_len

    def _new_prefill(self) -> Batch | None:
        self.prepare_preemption()
        if (self.batch_is_full or not self.waiting) and self.chunked is None:
            return None
        if self._no_places():
            self.batch_is_full = True
            return None
        if self._has_host:
            self.cache.check_hicache_events()
        self._policy.sort(self.waiting)
        adder = PrefillAdder(self.config, self.cache, self.pool, self.running, self.new_token_ratio)
        if self.chunked is not None:
            self._init_next_round(self.chunked, match=False)
            self.chunked = adder.add_chunked_req(self.chunked)
        self._admit_waiting(adder)
        # Requests preempted for one that could not be admitted after all are lost: upstream queues them again with a
        # batch only (`get_new_batch_prefill`), and their clients wait for ever.
        return self._extend_batch(adder) if adder.can_run else None

    def _no_places(self) -> bool:
        if self._preempts or len(self.running) < self.config.max_running_requests:
            return False
        return (self.chunked is not None) == self._rules.tries_without_free_places

    def _admit_waiting(self, adder: PrefillAdder) -> None:
        for request in self.waiting:
            if len(adder.can_run) >= self.config.max_running_requests - len(self.running):
                self.batch_is_full = True
            if self.batch_is_full:
                kept = adder.preempt_to_schedule(request, self.running, self._release) if self._preempts else None
                if kept is None:
                    return
                self.running = kept
            if self._has_storage and not self.cache.check_prefetch_progress(request):
                continue
            self._init_next_round(request)
            result = adder.add_one_req(request)
            if result is not AddReqResult.CONTINUE:
                if result is AddReqResult.NO_TOKEN:
                    # With a host level, only once somebody can be served.
                    self.batch_is_full = not self._has_host or bool(adder.can_run or self.running)
                return

    def _extend_batch(self, adder: PrefillAdder) -> Batch:
        admitted = adder.can_run
        self._take_from_queue(admitted)
        for request in adder.preempted:
            self.add(request)
        if adder.new_chunked is not None:
            assert self.chunked is None
            self.chunked = adder.new_chunked
        if self.chunked is not None:
            self.chunked.num_chunks_in_flight += 1
        load_end_ns = self.cache.ready_to_load_host_cache() if self._has_host else None
        batch = Batch(
            EXTEND,
            admitted,
            [request.prefix_len for request in admitted],
            [request.extend_input_len for request in admitted],
            len(admitted),
            self.chunked,
            load_end_ns,
        )
        self._allocate_extend(admitted)
        if self.config.mixes_chunks and self.running:
            self._mix(batch)
        return batch

    def _take_from_queue(self, admitted: list[SglangRequest]) -> None:
        """Who is admitted waits no longer: most often the head of the queue."""
        # A pending chunk, which holds KV already, comes before those from the queue (of whom prefetches may hold some up).
        first = int(admitted[0].kv_len > 0)
        if self.waiting[: len(admitted) - first] == admitted[first:]:
            del self.waiting[: len(admitted) - first]
            return
        members = set(admitted)
        self.waiting = [request for request in self.waiting if request not in members]

    def _allocate_extend(self, admitted: list[SglangRequest]) -> None:
        pool = self.pool
        if admitted[0].extend_input_len < 0:
            # `add_chunked_req` cuts the chunk to what memory leaves, and running requests may have reserved even more.
            raise UpstreamStopError(
                "memory leaves less than nothing for a pending chunk: SGLang leaks KV and stops here"
            )
        num_tokens = sum([request.extend_input_len for request in admitted])
        wanted = num_tokens if pool.page_size == 1 else num_tokens + len(admitted) * pool.page_size
        self._evict_for(wanted)
        new = sum([pool.ceil(request.fill_len) - pool.ceil(request.prefix_len) for request in admitted])
        if not pool.alloc(new):
            raise UpstreamStopError(f"a prefill of {num_tokens} tokens finds {pool.available} free: SGLang stops here")
        for request in admitted:
            request.kv_len = request.fill_len
            if not request.was_retracted:
                request.num_cached_tokens += request.prefix_len - request.already_computed
                request.already_computed = request.fill_len
                from_storage = min(request.loaded_len, request.storage_hit_len)
                request.num_storage_tokens += from_storage
                request.num_host_tokens += request.loaded_len - from_storage
            request.is_retracted = False

    def _mix(self, batch: Batch) -> None:
        """The running requests decode within the prefill batch (`mix_with_running`)."""
        self._drop_finished()
        decodes = self.running
        if decodes:
            batch.cache_lens += self._allocate_decode()
            for request in decodes:
                request.fill_len = request.num_tokens
                request.extend_input_len = 1
            batch.mode = MIXED
            batch.requests = batch.requests + decodes
            batch.input_lens += [1] * len(decodes)
        self.running = []

    def _drop_finished(self) -> None:
        if self._some_finished:
            self.running = [request for request in self.running if not request.finished]
            self._some_finished = False

    def _decode(self) -> Batch | None:
        """All running requests take one step (`update_running_batch`)."""
        num_before = len(self.running)
        self._drop_finished()
        if not self.running:
            self.batch_is_full = False
            return None
        retracted: list[SglangRequest] = []
        if self._has_room(self.running):
            self.new_token_ratio = max(self.new_token_ratio - self.ratio_decay, self.min_ratio)
        else:
            retracted = self._retract()
            for request in retracted:
                self.add(request)
        if len(self.running) < num_before:
            self.batch_is_full = False
        cache_lens = self._allocate_decode()
        return Batch(DECODE, self.running, cache_lens, [1] * len(cache_lens), 0, retracted=retracted)

    def make_room(self) -> bool:
        """Evict what the next decode would; False where it would retract somebody."""
        wanted = len(self.running) * self.pool.page_size
        if self.pool.available < wanted:
            if not self._has_room(self.running):
                return False
            self._evict_for(wanted)
        return True

    def _has_room(self, requests: list[SglangRequest]) -> bool:
        """Whether the next token of each finds room, after an eviction if need be (`check_decode_mem`)."""
        num_tokens = self.num_new_pages(requests) * self.pool.page_size
        self._evict_for(num_tokens)
        return self.pool.available >= num_tokens

    def num_new_pages(self, requests: list[SglangRequest]) -> int:
        """Pages that the next decode step is expected to begin."""
        size = self.pool.page_size
        if size == 1:
            return len(requests)
        return [length % size for length in self.expected_lens(requests)].count(0)

    def expected_lens(self, requests: list[SglangRequest]) -> list[int]:
        """Tokens with KV, as they are counted to tell who begins a page with the next decode step."""
        if self._rules.counts_pages_by_kv:
            return [request.kv_len for request in requests]
        known = 0 if not self.config.disable_overlap_schedule else 1
        return [request.num_tokens - known for request in requests]

    def _retract(self) -> list[SglangRequest]:
        """Take requests out until the rest finds room: fewest outputs first, ties longest prompt first."""
        order = sorted(self.running, key=lambda r: (r.num_outputs, -r.num_prompt_tokens), reverse=True)
        retracted: list[SglangRequest] = []
        while not retracted or not self._has_room(order):
            if len(order) == 1:
                self._check_lone(order)
                break
            victim = order.pop()
            retracted.append(victim)
            self._release(victim, len(order))
        if self._rules.lone_request_must_fit and len(order) <= 1 and not self._has_room(order):
            raise UpstreamStopError("the last running request finds no room for its next token: SGLang stops here")
        self.running = order
        num_outputs = sum([request.num_outputs for request in order])
        max_outputs = sum([request.max_new_tokens for request in order])
        self.new_token_ratio = min(1.0, (num_outputs + _RETRACT_DECODE_STEPS * len(order)) / (max_outputs + 1))
        return retracted

    def _check_lone(self, order: list[SglangRequest]) -> None:
        if not self._rules.lone_request_must_fit and self.pool.available <= 0:
            raise UpstreamStopError(f"no KV slot is left for the only request, {order[0].row}: SGLang stops here")

    def _release(self, request: SglangRequest, num_remaining: int) -> None:
        """Free a retracted or preempted request's KV at once, without keeping it (`release_req`)."""
        if request.finished:
            # 0.5.6 only: `preempt_to_schedule` may pick a request whose KV has just been freed.
            raise UpstreamStopError(
                f"Committed KV cache already freed (self.kv_committed_len={request.kv_len}): SGLang 0.5.6 preempts a "
                'request that has just finished and dies; version = "0.5.9" does not'
            )
        self.cache.cache_finished_req(request, is_insert=False)
        self._evict_for(num_remaining * _RETRACT_DECODE_STEPS)
        request.reset_for_retract()

    def _evict_for(self, num_tokens: int) -> None:
        """Evict the full need, not the shortfall (`evict_from_tree_cache`)."""
        if self.pool.available < num_tokens:
            self.cache.evict(num_tokens)

    def _allocate_decode(self) -> list[int]:
        """A slot for the next token of each running request; returns the tokens with KV before."""
        pool, running = self.pool, self.running
        size = pool.page_size
        self._evict_for(len(running) * size)
        kv_lens = [request.kv_len for request in running]
        new = len(running) if size == 1 else size * [length % size for length in kv_lens].count(0)
        if not pool.alloc(new):
            raise UpstreamStopError(f"a decode of {len(running)} finds {pool.available} slots: SGLang stops here")
        for request in running:
            request.kv_len += 1
        return kv_lens

    def process(self, batch: Batch) -> list[SglangRequest]:
        """Take in a batch's tokens; returns the requests that finish with it, in order."""
        finished: list[SglangRequest] = []
        for request in batch.requests[: batch.num_prefills]:
            if request.finished or request.is_retracted:
                continue
            if request.num_chunks_in_flight > 0:
                request.num_chunks_in_flight -= 1
                continue
            request.num_outputs += 1
            if request.num_outputs >= request.max_new_tokens:
                self._finish(request, finished)
            else:
                self.cache.cache_unfinished_req(request)
        decodes = batch.requests[batch.num_prefills :] if batch.num_prefills else batch.requests
        for request in decodes:
            if request.finished or request.is_retracted:
                continue
            request.num_outputs += 1
            if request.num_outputs >= request.max_new_tokens:
                self._finish(request, finished)
        return finished

    def _finish(self, request: SglangRequest, finished: list[SglangRequest]) -> None:
        request.finished = True
        self._some_finished = True
        finished.append(request)
        self.cache.cache_finished_req(request)
