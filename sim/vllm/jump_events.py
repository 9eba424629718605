"""What happens at an event of the event loop: requests arrive, and one step is taken as the scheduler decides it."""

from __future__ import annotations

from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.pricing import Pricer
from kvtwin.sim.progress import Progress
from kvtwin.sim.vllm.block_pool import Pool
from kvtwin.sim.vllm.block_tables import BlockTables
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.jump_log import JumpLog
from kvtwin.sim.vllm.queues import WaitingQueue
from kvtwin.sim.vllm.recorder import UNKNOWN, RequestTimes, StepLog
from kvtwin.sim.vllm.request import RequestBook
from kvtwin.sim.vllm.running import PLACE_BITS, PLACE_MASK, Batch, Chunk, Partial, Ready, Running
from kvtwin.traces.errors import KvtwinError

NEVER_NS = 1 << 62


class JumpEvents(Running):
    """What happens at an event.

    Args:
        config: the engine's settings.
        requests: the workload.
        waiting: the waiting queue, shared with the plain loop.
        blocks: KV blocks of the running requests.
        pool: where they come from, for the counts in the log.
        pricer: how long the model runs for a batch.
        host: time between steps.
        times: where the requests' time stamps go.
        log: where the steps go; None to keep none.
        may_preempt: False to return instead where somebody has to be preempted.
        progress: told how many requests have finished, whenever some have.
    """

    def __init__(
        self,
        config: VllmConfig,
        requests: RequestBook,
        waiting: WaitingQueue,
        blocks: BlockTables,
        pool: Pool,
        pricer: Pricer,
        host: HostTime,
        times: RequestTimes,
        log: StepLog | None,
        *,
        may_preempt: bool,
        progress: Progress | None,
    ) -> None:
        super().__init__(blocks, needs_spread=pricer.needs_spread)
        self._requests, self._waiting, self._pool = requests, waiting, pool
        self._pricer, self._host, self._times, self._progress = pricer, host, times, progress
        self._log = JumpLog(log, self, waiting, blocks, pool, host) if log is not None else None
        self._started = requests.started
        self._host_takes_time, self._gap_ns = host.takes_time, host.gap_ns
        self._block_size = config.block_size
        self._preempts_last = may_preempt and config.policy == "fcfs"
        self._arrivals_overtake = config.policy != "fcfs"
        self.records_steps = log is not None
        self._asynchronous = config.async_scheduling
        self._max_num_seqs, self._max_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self._cuts_prompts = config.long_prefill_token_threshold > 0
        self.num_arrived = 0
        self._arrival_ns = [*requests.arrival_ns, NEVER_NS]
        self._next_arrival_ns = self._arrival_ns[0]
        self._head_blocked = False  # the head of the waiting queue did not fit, and nothing was freed since

    def resume(self, now_ns: int, device_free_ns: int, num_steps: int, num_arrived: int) -> None:
        """Set the clock to where the plain loop stopped."""
        self.now_ns, self.device_free_ns = now_ns, device_free_ns
        self.num_steps, self.num_arrived = num_steps, num_arrived
        self._next_arrival_ns = self._arrival_ns[num_arrived]
        self._head_blocked = False

    def _take_arrivals(self) -> None:
        arrival_ns, queued, waiting = self._arrival_ns, self._times.queued, self._waiting
        row, now_ns = self.num_arrived, self.now_ns
        while arrival_ns[row] <= now_ns:
            queued[row] = now_ns
            waiting.append(row)
            row += 1
        self.num_arrived = row
        self._next_arrival_ns = arrival_ns[row]
        if self._arrivals_overtake:
            self._head_blocked = False

    def _wait(self) -> bool:
        """Nothing can run: move the clock to the next arrival; False when everything is done."""
        if self._next_arrival_ns == NEVER_NS:
            if self._waiting:
                raise KvtwinError("waiting requests can never be scheduled: the KV cache is too small for them")
            return False
        self.now_ns = max(self.now_ns, self._next_arrival_ns)
        return True

    # --- one step --------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One turn of the loop with whatever the scheduler decides; False if a request would be preempted."""
        num_decode, partial = self.num_decode, self.partial
        budget = self._max_tokens - num_decode
        if budget <= 0:
            return False
        chunk = min(partial.num_tokens - partial.num_computed, budget) if partial else 0
        num_evicted = self._pool.num_evicted
        preempted: list[int] = []
        if (num_decode > self._pool.num_free or partial) and not self._fits(partial, chunk):
            if not self._preempts_last or (self.pending and self.pending.last_places):
                return False
            preempted = self._grow_or_preempt(chunk)
            num_decode, partial = self.num_decode, self.partial
        elif num_decode:
            self._blocks.grow(self.num_steps, 1, num_decode)
        chunks: list[Chunk] = []
        ready: list[Ready] = []
        if partial:
            self._continue(partial, chunk, chunks, ready)
        if self._waiting and not self._head_blocked and not preempted:
            self._admit(budget - chunk, chunks, ready)
        batch = None
        if num_decode or chunks:
            batch = self._launch(chunks)
            if self._log is not None:
                batch.rows = self._log.rows(batch, self._pool.num_evicted - num_evicted, preempted)
            self._advance(batch, ready)
        if self._asynchronous:
            batch, self.pending = self.pending, batch
        if batch:
            if batch.end_ns > self.now_ns:
                self.now_ns = batch.end_ns
            if self._host_takes_time:
                self.now_ns += self._host.update(batch.num_reqs)
            self._take_in(batch)
        return True

    def _fits(self, partial: Partial | None, chunk: int) -> bool:
        """Whether nobody needs to be preempted for a step that also has `chunk` tokens of the partial prompt."""
        free = self._pool.num_free
        if partial:
            free -= self._blocks.num_missing(partial.num_computed, chunk)
        # At most one block per decode at a step.
        return self.num_decode <= free or (free >= 0 and self._blocks.num_crossing(self.num_steps) <= free)

    def _grow_or_preempt(self, chunk: int) -> list[int]:
        """Give the running requests their blocks in order; where one is missing, preempt the last of them, as
        `VllmScheduler._schedule_running` does with the fcfs policy. Returns the preempted rows.

        The blocks of the partial prompt are only made sure of.
        """
        places, preempted = sorted(key & PLACE_MASK for key in self.ends), []
        index = 0
        while index < len(places):
            place = places[index]
            index += 1
            if (self.base_at[place] + self.num_steps) % self._block_size:
                continue
            while not self._pool.num_free:
                victim = self.partial.place if self.partial else places.pop()
                preempted.append(self._preempt(victim))
                if victim == place:
                    return preempted
            self._blocks.grow_one(self.row_at[place])
        partial = self.partial
        if partial and self._blocks.num_missing(partial.num_computed, chunk) > self._pool.num_free:
            preempted.append(self._preempt(partial.place))
        return preempted

    def _preempt(self, place: int) -> int:
        """Take the blocks from a running request and put it back in front of the waiting queue; returns its row.

        Under asynchronous scheduling its token in flight counts as known already: it is, when the request is next
        looked at.
        """
        row, partial = self.row_at[place], self.partial
        request = self._requests[row]
        in_flight = self.pending.chunk_of(place) if self.pending else None
        if partial and partial.place == place:
            num_computed = num_known = partial.num_computed
            num_left, self.partial = partial.num_left, None
        else:
            num_computed = self.base_at[place] + self.num_steps
            num_known = num_computed - 1 if self.pending and in_flight is None else num_computed
            num_left = self.num_steps_left(place)
            self.drop(place, num_computed)
        blocks, _ = self._blocks.unload(row, num_computed, num_known)
        self._pool.free(blocks)
        request.put_back(request.max_tokens - num_left)
        self._times.note_preempted(row, self.now_ns)
        self._waiting.appendleft(row)
        self.num_running -= 1
        self._head_blocked = False
        return row

    def _continue(self, partial: Partial, chunk: int, chunks: list[Chunk], ready: list[Ready]) -> None:
        self._blocks.extend(partial.row, partial.num_computed, chunk)
        chunks.append((partial.place, partial.row, partial.num_computed, chunk))
        partial.num_computed += chunk
        if partial.num_computed == partial.num_tokens:
            ready.append((partial.place, partial.row, partial.num_tokens, partial.num_left))
            self.partial = None

    def _admit(self, budget: int, chunks: list[Chunk], ready: list[Ready]) -> None:
        """Admit waiting requests while the budget lasts; appends to `chunks`, and to `ready` whose prompt is done."""
        waiting, times, requests, started = self._waiting, self._times, self._requests, self._started
        while waiting and budget > 0 and self.num_running < self._max_num_seqs:
            row = waiting[0]
            num_tokens, num_left = requests.num_prompt_tokens[row], requests.max_tokens[row]
            if started and row in started:  # it comes back after a preemption
                num_outputs = started[row].num_output_tokens
                num_tokens += num_outputs
                num_left -= num_outputs
            admission = self._blocks.admit(row, num_tokens, budget, self.num_running > 0)
            if admission is None:
                # With part of the budget taken by others it may be that, and the next step has it again.
                self._head_blocked = not chunks
                return
            waiting.popleft()
            cached, chunk = admission
            place = self.take_place(row)
            budget -= chunk
            chunks.append((place, row, cached, chunk))
            if cached + chunk == num_tokens:
                ready.append((place, row, num_tokens, num_left))
            else:
                self.partial = Partial(place, row, cached + chunk, num_tokens, num_left)
            if times.scheduled[row] == UNKNOWN:
                times.scheduled[row] = self.now_ns
                times.cached[row] = cached
            else:
                times.note_back(row, self.now_ns)

    def _launch(self, chunks: list[Chunk]) -> Batch:
        """Price the step and give it its place on the device."""
        duration_ns = self._pricer.step_ns(self.batch_with(chunks), self.num_steps)
        sched_ns = now_ns = self.now_ns
        num_reqs, start_ns = self.num_decode + len(chunks), self.device_free_ns
        if self._host_takes_time:
            now_ns = self.now_ns = now_ns + self._host.schedule(num_reqs)
        if now_ns > start_ns:
            start_ns = now_ns
        end_ns = start_ns + duration_ns
        self.device_free_ns = end_ns + self._gap_ns
        return Batch(sched_ns, start_ns, end_ns, num_reqs, chunks, [], [])

    def _advance(self, batch: Batch, ready: list[Ready]) -> None:
        """Every decode is one token further; those at their end leave the decodes, those with a prompt done join."""
        step, ends = self.num_steps, self.ends
        if self._needs_spread:
            self.context_sq += 2 * self.context + self.num_decode
        self.context += self.num_decode
        self.num_steps = step + 1
        if ends and ends[0] >> PLACE_BITS == step:
            batch.last_places = self.leave(step)
            self._head_blocked = False  # a smaller batch leaves more of the budget
        for place, row, num_tokens, num_left in ready:
            batch.first_rows.append(row)
            if num_left == 1:
                batch.last_places.append(place)
                self._head_blocked = False
            else:
                self.join(place, row, num_tokens - step - 1, step + num_left - 1)

    def _take_in(self, batch: Batch) -> None:
        """A batch's tokens are known, at this time of the clock."""
        if batch.rows is not None and self._log is not None:
            self._log.write(batch, batch.rows)
        first_token, now_ns = self._times.first_token, self.now_ns
        for row in batch.first_rows:
            if first_token[row] == UNKNOWN:
                first_token[row] = now_ns
        if batch.last_places:
            self._finish(batch.last_places)

    def _finish(self, places: list[int]) -> None:
        for place in places:
            row = self.row_at[place]
            self._times.finish[row] = self.now_ns
            self._blocks.release(row)
            if self._started:
                self._requests.drop(row)
        self.num_running -= len(places)
        self._head_blocked = False
        if self._progress is not None:
            self._progress(len(places))
