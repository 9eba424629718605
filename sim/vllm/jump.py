"""The engine's loop from event to event: cost grows with requests, not with tokens or batch size.

Between events (an arrival, an admission, a prompt chunk, a finish, a block shortage) the same requests decode one
token each at every step. Nobody is looked at then:

- a running request is a base (its cache_len at step s is base + s) and the step of its last token, a key in a heap;
- the sums over the batch that latency depends on move by a closed form, which prices a stretch of steps at once;
- how many requests need a block at a step depends on the step modulo the block size (`block_tables.py`);
- the same closed form says after which step the next arrival is seen.

`PlainLoop` is the specification: both give the same run bit for bit, whatever the workload (tests/property). What is
rare is left to it: `run` returns, and `handover.py` carries the state over, when a step would preempt under the
priority policy, when prompts are cut by `long_prefill_token_threshold`, or when the batch fills the token budget.
"""

from __future__ import annotations

from kvtwin.sim.latency.pricing import Durations
from kvtwin.sim.vllm.jump_events import JumpEvents
from kvtwin.sim.vllm.running import PLACE_BITS, Batch


class JumpLoop(JumpEvents):
    """Serves requests from event to event, until all is served or something rare comes up (arguments: `JumpEvents`)."""

    def run(self) -> bool:
        """True when everything is served; False when the plain loop must take the next step.

        Raises:
            KvtwinError: a waiting request can never be scheduled.
        """
        asynchronous, waiting, max_num_seqs = self._asynchronous, self._waiting, self._max_num_seqs
        while True:
            if self.now_ns >= self._next_arrival_ns:
                self._take_arrivals()
            tries = waiting and not self._head_blocked and self.num_running < max_num_seqs
            pending = self.pending
            if (
                self.partial
                or tries
                or (asynchronous and (not pending or (pending.last_places and self._finish_may_matter())))
            ):
                if tries and self._cuts_prompts:
                    return False
                if not (self.num_running or tries):
                    if not self._wait():
                        return True
                elif not self._step():
                    return False
            elif self.num_decode:
                if not self._stretch():
                    return False
            elif not self._wait():
                return True

    def _finish_may_matter(self) -> bool:
        """Whether a finish with the batch in flight keeps the next turns from being a stretch: it may make room for
        somebody, and in a log it has a row of its own."""
        return len(self._waiting) > 0 or self._log is not None or not self.num_decode

    # --- many steps ------------------------------------------------------------------------------------------------

    def _stretch(self) -> bool:
        """Decode until somebody is at the end, blocks run short, or an arrival is seen; False if a request would be
        preempted at once."""
        step, num_decode, context = self.num_steps, self.num_decode, self.context
        most = (self.ends[0] >> PLACE_BITS) - step + 1
        if num_decode * (most // self._block_size + 1) > self._pool.num_free:
            most = self._blocks.num_steps_that_fit(step, num_decode, most)
            if not most:
                return self._step()
        longest = self.longest_context() if self._needs_spread else 0
        durations = self._pricer.stretch(num_decode, context, self.context_sq, longest, most, step)
        if durations.num_steps < most:
            most = durations.num_steps
        pending = self.pending
        before = self._log.moment() if self._log is not None else None
        if pending:
            grown = 1 if pending.last_places else 0
            if grown:  # the first step takes its blocks before those of the finished are free
                self._blocks.grow(step, 1, num_decode)
            count = self._run_overlapped(durations, most, pending)
        else:
            grown, count = 0, self._run_clock(durations, most)
        if before is not None and self._log is not None:
            self._log.stretch(durations.list_ns(count).tolist(), before)
        elif count > grown:
            self._blocks.grow(step + grown, count - grown, num_decode)
        if self._needs_spread:
            self.context_sq += count * (2 * context + count * num_decode)
        self.context = context + count * num_decode
        self.num_steps = step + count
        last_step = step + count - 1
        if self.ends[0] >> PLACE_BITS == last_step:
            places = self.leave(last_step)
            self._head_blocked = False  # a smaller batch leaves more of the budget
            if self.pending:
                self.pending.last_places = places
            else:
                self._finish(places)
        return True

    def _run_clock(self, durations: Durations, most: int) -> int:
        """Run the clock over at most `most` steps, to the first after which an arrival is seen; returns how many."""
        update_ns, between_ns, start_ns = 0, self._gap_ns, self.now_ns
        if self._host_takes_time:
            schedule_ns, update_ns = self._host.schedule(self.num_decode), self._host.update(self.num_decode)
            start_ns += schedule_ns
            between_ns = max(between_ns, update_ns + schedule_ns)  # from one step's end to the next one's start
        if self.device_free_ns > start_ns:
            start_ns = self.device_free_ns
        # With no arrival to come, the time is never reached and all steps are taken.
        until_ns = self._next_arrival_ns - update_ns - start_ns + between_ns
        count, total_ns = durations.reach(until_ns, between_ns, most)
        end_ns = start_ns + total_ns + (count - 1) * between_ns
        self.now_ns = end_ns + update_ns
        self.device_free_ns = end_ns + self._gap_ns
        return count

    def _run_overlapped(self, durations: Durations, most: int, pending: Batch) -> int:
        """The same under asynchronous scheduling: each step starts when the device is free, and the host takes in the
        step before it meanwhile. The last step is in flight afterwards."""
        update_ns, gap_ns, num_decode = 0, self._gap_ns, self.num_decode
        arrival_ns, now_ns, start_ns = self._next_arrival_ns, self.now_ns, self.device_free_ns
        # After the first turn the host has taken in what was in flight; after turn m, the stretch's first m - 1 steps.
        if self._host_takes_time:
            schedule_ns, update_ns = self._host.schedule(num_decode), self._host.update(num_decode)
            launched_ns = now_ns + schedule_ns
            start_ns = max(start_ns, launched_ns)
            now_ns = max(launched_ns, pending.end_ns) + self._host.update(pending.num_reqs)
            if (
                now_ns + schedule_ns > start_ns + durations.least_ns
                or durations.least_ns + gap_ns < update_ns + schedule_ns
            ):
                most = 1  # the host is the slower one: step by step
        else:
            if now_ns > start_ns:
                start_ns = now_ns
            if pending.end_ns > now_ns:
                now_ns = pending.end_ns
        self.now_ns = now_ns
        if pending.first_rows or pending.last_places or pending.rows is not None:
            self._take_in(pending)
        count = 1
        if most > 1 and now_ns < arrival_ns:
            # The host sees an arrival when it has taken in the last step but one.
            count, total_ns = durations.reach(arrival_ns - update_ns - start_ns + gap_ns, gap_ns, most - 1)
            start_ns += total_ns + count * gap_ns
            self.now_ns = start_ns - gap_ns + update_ns
            count += 1
        end_ns = start_ns + durations.last_ns(count)
        self.device_free_ns = end_ns + gap_ns
        # The batch taken in becomes the one in flight.
        pending.start_ns, pending.end_ns, pending.num_reqs = start_ns, end_ns, num_decode
        pending.chunks, pending.first_rows, pending.last_places = [], [], []
        return count
