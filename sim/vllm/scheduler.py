"""The scheduler of vLLM V1, versions 0.32 and 0.19, decision for decision.

Follows `vllm/v1/core/sched/scheduler.py` (`Scheduler.schedule`, `_preempt_request`, `update_from_output`)
and `async_scheduler.py` (`AsyncScheduler`). There is no prefill phase and no decode phase: each request
has computed tokens and known tokens, and every step lets the first catch up with the second.

With KV tiers, a waiting request may first fetch blocks from the host (`WAITING_FOR_REMOTE_KVS`, `offload/`); with
swap-based preemption, V0's rule (0.5 `core/scheduler.py`): who is swapped out comes back before anybody is admitted.

Not modelled, because no supported setting reaches it: speculative decoding, encoders, LoRA limits, other KV
connectors, structured output.
"""

from __future__ import annotations

from kvtwin.sim.vllm.admission import Admission
from kvtwin.sim.vllm.block_pool import Pool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.freeing import Freeing
from kvtwin.sim.vllm.kv_manager import KVCacheManager
from kvtwin.sim.vllm.offload.connector import Connector, Scheduled
from kvtwin.sim.vllm.plan import Call, StepPlan
from kvtwin.sim.vllm.request import Request, RequestBook, Status
from kvtwin.sim.vllm.swap import SwapSpace


class VllmScheduler:
    """Decides, at each step, who runs with how many tokens.

    Args:
        config: the engine's settings; `config.rules` holds what differs between versions.
        requests: what the rows stand for.
        pool: the KV blocks.
        offload: the levels below them, if there are any.
        swap: where preempted requests go, if they are swapped out.
    """

    def __init__(
        self,
        config: VllmConfig,
        requests: RequestBook,
        pool: Pool,
        offload: Connector | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        self.config, self._rules, self._requests = config, config.rules, requests
        self.kv = KVCacheManager(
            pool,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            watermark_blocks=int(config.watermark * config.num_gpu_blocks),
        )
        waits = offload is not None and config.async_scheduling and config.rules.holds_back_written_blocks
        self._freeing = Freeing(self.kv, waits=waits)
        self._admission = Admission(config, requests, self.kv, offload)
        self.waiting = self._admission.waiting
        self.running: list[Request] = []
        self.swapped: list[Request] = []
        self._offload, self._swap = offload, swap
        # vLLM makes one more call after a request finishes, to pass its id on to the workers.
        self._finished_ids_to_flush = False

    def allocate_by(self, kv: KVCacheManager) -> None:
        """Let another manager of the same pool give out the blocks, from the first call on."""
        self.kv = self._freeing.kv = self._admission.kv = kv

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.running) or len(self._admission) > 0 or bool(self.swapped)

    @property
    def has_requests(self) -> bool:
        """Whether the engine calls schedule() (`Scheduler.has_requests`)."""
        if self.has_unfinished or self._finished_ids_to_flush:
            return True
        return self._offload is not None and self._offload.keeps_stepping and self._offload.has_jobs

    def schedule(self) -> StepPlan:
        """Decide the next step: running requests in list order, then, if nobody was preempted, waiting ones."""
        num_evicted = self.kv.pool.num_evicted
        call = Call(self.config.max_num_batched_tokens, self._long_prefill_threshold())
        self._schedule_running(call)
        if not call.preempted:
            self._schedule_swapped(call)
            if not self.swapped:
                self._admission.schedule(call, self.running)
        if self._offload is not None:
            self._offload.end_schedule(Scheduled(call.tokens, call.preempted, list(call.allocated.values())))
        plan = self._plan(call, num_evicted)
        self._finished_ids_to_flush = False
        return plan

    def _long_prefill_threshold(self) -> int:
        # 0.32: a request that is alone starves nobody, so it may use the whole budget.
        alone = len(self.running) + len(self._admission) + len(self.swapped) <= 1
        exempt = alone and self._rules.lone_request_ignores_long_prefill_threshold
        return 0 if exempt else self.config.long_prefill_token_threshold

    def _schedule_running(self, call: Call) -> None:
        index = 0
        while index < len(self.running) and call.budget > 0:
            request = self.running[index]
            num_new_tokens = self._num_running_tokens(request, call)
            if num_new_tokens == 0:
                index += 1
                continue
            while not self.kv.can_grow(request, num_new_tokens):
                victim = self._victim()
                if not self._freeing.is_possible(victim):
                    return
                index = self._preempt(victim, call, index)
                if victim is request:
                    return
            num_held = len(request.blocks)
            self.kv.grow(request, num_new_tokens)
            call.take(request, num_new_tokens)
            if self._offload is not None and num_held < len(request.blocks):
                call.allocated[request] = request.blocks[num_held:]
            index += 1

    def _num_running_tokens(self, request: Request, call: Call) -> int:
        """New tokens of a running request; 0 if the tokens in flight complete its output."""
        in_flight = request.num_output_placeholders
        end = request.num_prompt_tokens + request.max_tokens
        if in_flight > 0 and request.num_computed_tokens + 2 - in_flight >= end:
            return 0
        num_tokens = call.cut(request.num_tokens + in_flight - request.num_computed_tokens)
        # The position after the input, where the sampled token goes, must stay within the model's length.
        return min(num_tokens, call.budget, self.config.max_model_len - 1 - request.num_computed_tokens)

    def _victim(self) -> Request:
        if self.config.policy == "fcfs":
            return self.running[-1]
        return max(self.running, key=lambda request: (request.priority, request.arrival_ns))

    def _preempt(self, victim: Request, call: Call, index: int) -> int:
        """Take the blocks from a victim; returns where the loop over `running` goes on."""
        if self.config.policy == "fcfs":
            self.running.pop()
        else:
            place = self.running.index(victim)
            del self.running[place]
            was_scheduled = call.take_back(victim)
            stood_before = place < index if self._rules.victim_place_moves_index else was_scheduled
            index -= stood_before
        if self._offload is not None:
            self._offload.preempted(victim)
            self._admission.prompt_done(victim)
        call.preempted.append(victim)
        self._freeing.free(victim)
        if self._swap is not None and self._swap.take(victim):
            victim.status = Status.SWAPPED
            self.swapped.append(victim)
            return index
        victim.status = Status.WAITING
        victim.num_computed_tokens = 0
        if self._rules.hold_back_stale_output:
            victim.num_stale_output_tokens = victim.num_in_flight_tokens
            victim.num_output_placeholders = 0
        self.waiting.appendleft(victim.row)
        return index

    def device_ready_ns(self, start_ns: int) -> int:
        """When the device may run what was scheduled last, which would be at `start_ns`: swaps run before it."""
        return start_ns if self._swap is None else self._swap.copy(start_ns)

    def _schedule_swapped(self, call: Call) -> None:
        """Swap requests in, by priority and arrival, as long as they fit (V0 `_schedule_swapped`)."""
        if self.config.policy == "fcfs":
            self.swapped.sort(key=lambda request: request.row)
        else:
            self.swapped.sort(key=lambda request: (request.priority, request.row))
        for request in list(self.swapped):
            if call.budget <= 0 or len(self.running) >= self.config.max_num_seqs:
                return
            num_new_tokens = self._num_running_tokens(request, call)
            if num_new_tokens == 0:  # its last token is in flight
                continue
            if not self.kv.can_resume(request, num_new_tokens, whole_sequence=True, watermark=bool(self.running)):
                return
            assert self._swap is not None
            self._swap.give_back(request)
            self.swapped.remove(request)
            self.kv.grow(request, num_new_tokens)
            request.status = Status.RUNNING
            self.running.append(request)
            call.take(request, num_new_tokens)
            call.allocated[request] = request.blocks

    def _plan(self, call: Call, num_evicted_before: int) -> StepPlan:
        """Advance the scheduled requests (`_update_after_schedule`) and describe the step."""
        cache_lens, samples = [], []
        for request, num_tokens in call.tokens.items():
            cache_lens.append(request.num_computed_tokens)
            request.num_computed_tokens += num_tokens
            request.num_in_flight_tokens += num_tokens
            known = request.num_tokens + request.num_output_placeholders
            reaches_end = request.num_computed_tokens >= known
            samples.append(reaches_end)
            if reaches_end and self.config.async_scheduling:
                request.num_output_placeholders += 1
            if reaches_end and self._offload is not None:
                self._admission.prompt_done(request)
        if call.tokens:
            self._freeing.step_scheduled(call.tokens)
        return StepPlan(
            requests=list(call.tokens),
            cache_lens=cache_lens,
            input_lens=list(call.tokens.values()),
            samples=samples,
            preempted=call.preempted,
            num_waiting=len(self._admission),
            num_running=len(self.running),
            num_free_blocks=self.kv.pool.num_free,
            num_evicted_blocks=self.kv.pool.num_evicted - num_evicted_before,
        )

    def update(self, plan: StepPlan) -> list[Request]:
        """Take in a step's tokens; returns the requests that finish with it, in order.

        Blocks are freed in the order of the batch, which fixes the order of the free queue.
        """
        self._freeing.step_taken_in()
        finished = []
        for request, num_tokens, sampled in zip(plan.requests, plan.input_lens, plan.samples, strict=True):
            request.num_in_flight_tokens -= num_tokens
            stale = request.num_stale_output_tokens > 0
            if stale:
                request.num_stale_output_tokens -= num_tokens
            if sampled and self._take_token(request, stale=stale):
                finished.append(request)
        self._retire(finished)
        return finished

    def _take_token(self, request: Request, *, stale: bool) -> bool:
        """One more output token is known; returns whether it is the last."""
        request.num_output_tokens += 1
        if self.config.async_scheduling:
            if not stale:
                request.num_output_placeholders -= 1
            if request.status is Status.RUNNING:
                self.kv.cache_known(request)
        at_limit = request.num_tokens >= self.config.max_model_len
        if request.num_output_tokens < request.max_tokens and not at_limit:
            return False
        if self._offload is None or not self._offload.finished(request):
            self._freeing.free(request)
        return True

    def _retire(self, finished: list[Request]) -> None:
        if not finished:
            return
        for request in finished:
            if request.status in (Status.WAITING, Status.FETCHING):  # preempted with its last token in flight
                self._admission.remove(request.row)
            elif request.status is Status.SWAPPED and self._swap is not None:
                self._swap.drop(request)
                self.swapped.remove(request)
            request.status = Status.FINISHED
            self._requests.drop(request.row)
        self.running = [request for request in self.running if request.status is Status.RUNNING]
        self._finished_ids_to_flush = True
