"""Write down what the event loop does, step by step, without the loop's going step by step."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace
from typing import NamedTuple

from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.vllm.block_pool import Pool
from kvtwin.sim.vllm.block_tables import BlockTables
from kvtwin.sim.vllm.recorder import UNKNOWN, StepLog, StepRows
from kvtwin.sim.vllm.running import PLACE_BITS, PLACE_MASK, Batch, Running


class Moment(NamedTuple):
    """The clock before a stretch; `in_flight`: end and size of the batch in flight."""

    now_ns: int
    device_free_ns: int
    in_flight: tuple[int, int] | None


class JumpLog:
    """Fills a `StepLog` from an event loop.

    Args:
        log: where the steps go.
        running: the loop's state.
        waiting: its waiting queue.
        blocks: KV blocks of the running requests; a logged stretch hands them out here, one step at a time.
        pool: where they come from.
        host: time between steps.
    """

    def __init__(
        self, log: StepLog, running: Running, waiting: Sized, blocks: BlockTables, pool: Pool, host: HostTime
    ) -> None:
        self._log, self._running, self._waiting = log, running, waiting
        self._blocks, self._pool, self._host = blocks, pool, host

    def rows(self, batch: Batch, num_evicted: int, preempted: Sequence[int] = ()) -> StepRows:
        """What the log will hold of a step; called after schedule() and before the decodes move on."""
        places = sorted(key & PLACE_MASK for key in self._running.ends)
        return StepRows(
            requests=[self._running.row_at[place] for place in places] + [row for _, row, _, _ in batch.chunks],
            cache_lens=[self._running.base_at[place] + self._running.num_steps for place in places]
            + [cache_len for _, _, cache_len, _ in batch.chunks],
            input_lens=[1] * len(places) + [num_tokens for _, _, _, num_tokens in batch.chunks],
            preempted=preempted,
            finished=(),
            num_waiting=len(self._waiting),
            num_running=self._running.num_running,
            num_free_blocks=[self._pool.num_free],
            num_evicted_blocks=[num_evicted],
            times_ns=[(batch.sched_ns, batch.start_ns, batch.end_ns, UNKNOWN)],
        )

    def write(self, batch: Batch, rows: StepRows) -> None:
        """A batch's tokens are known, at this time of the clock."""
        finished = [self._running.row_at[place] for place in batch.last_places]
        times_ns = [(batch.sched_ns, batch.start_ns, batch.end_ns, self._running.now_ns)]
        self._log.add(replace(rows, finished=finished, times_ns=times_ns))

    def moment(self) -> Moment:
        """Where the clock stands."""
        pending = self._running.pending
        in_flight = (pending.end_ns, pending.num_reqs) if pending else None
        return Moment(self._running.now_ns, self._running.device_free_ns, in_flight)

    def stretch(self, durations_ns: list[int], before: Moment) -> None:
        """Log a stretch and give its steps their blocks, one by one. The clock has moved on since `before`."""
        host, num_decode = self._host, self._running.num_decode
        now_ns, free_ns = before.now_ns, before.device_free_ns
        oldest_end_ns, num_oldest = before.in_flight or (None, num_decode)
        times_ns, known_ns = [], []
        first = self.rows(Batch(0, 0, 0, num_decode, [], [], []), 0)
        free, evicted = self._grow(len(durations_ns), num_decode)
        schedule_ns, gap_ns, update_ns = host.schedule(num_decode), host.gap_ns, host.update(num_oldest)
        for duration_ns in durations_ns:
            sched_ns = now_ns
            now_ns += schedule_ns
            start_ns = max(now_ns, free_ns)
            end_ns = start_ns + duration_ns
            free_ns = end_ns + gap_ns
            now_ns = max(now_ns, end_ns if oldest_end_ns is None else oldest_end_ns) + update_ns
            if oldest_end_ns is not None:
                oldest_end_ns = end_ns
            if num_oldest != num_decode:
                num_oldest, update_ns = num_decode, host.update(num_decode)
            times_ns.append((sched_ns, start_ns, end_ns))
            known_ns.append(now_ns)
        assert (now_ns, free_ns) == (self._running.now_ns, self._running.device_free_ns)
        if before.in_flight:  # each step is known a turn later
            known_ns = [*known_ns[1:], UNKNOWN]
        stamps = [(*times, known) for times, known in zip(times_ns, known_ns, strict=True)]
        self._write_stretch(replace(first, num_free_blocks=free, num_evicted_blocks=evicted, times_ns=stamps))

    def _grow(self, count: int, num_decode: int) -> tuple[list[int], list[int]]:
        """Give the steps of a stretch their blocks: free after each of them, and evicted by it."""
        blocks, pool, step = self._blocks, self._pool, self._running.num_steps
        num_free = pool.num_free
        free, evicted = [], [0] * count
        for ahead in range(count):
            if blocks.num_crossing(step + ahead):
                num_evicted = pool.num_evicted
                blocks.grow(step + ahead, 1, num_decode)
                num_free, evicted[ahead] = pool.num_free, pool.num_evicted - num_evicted
            free.append(num_free)
        return free, evicted

    def _write_stretch(self, rows: StepRows) -> None:
        """Under asynchronous scheduling the last step is still in flight, and may yet finish requests."""
        count, pending = len(rows.times_ns), self._running.pending
        if pending:
            pending.rows = rows.last()
            pending.sched_ns = pending.rows.times_ns[0][0]
            if count > 1:
                self._log.add(rows.head(count - 1))
            return
        last_step = self._running.num_steps + count - 1
        places = sorted(key & PLACE_MASK for key in self._running.ends if key >> PLACE_BITS == last_step)
        self._log.add(replace(rows, finished=[self._running.row_at[place] for place in places]))
