"""Stretches: decode steps that change nothing but counters, taken many at a time.

Between events (an arrival, an admission, a finish, a block shortage) the same requests decode one token each, step
after step. Then no decision needs to be taken again: the sums that latency depends on move by a closed form, one
vectorised call prices all steps, and blocks are handed out in the order in which single steps would have asked.

The plain path is the specification (`engine.py`): a run with stretches equals the run without them bit for bit,
whatever the workload (tests/property). Where anything is tight, `num_steady_steps` says 0 and the plain path decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtwin.sim.kv.manager import ceil_div
from kvtwin.sim.latency.stats import COLUMNS, BatchStats, IntArray
from kvtwin.sim.request import Request
from kvtwin.sim.schedulers.plan import StepPlan
from kvtwin.sim.schedulers.vllm import VllmScheduler

MIN_STEPS = 4  # shorter stretches cost more than they save
MAX_STEPS = 256  # most steps priced in one call: what an arrival cuts off was priced for nothing


@dataclass(frozen=True, slots=True)
class BlockUse:
    """What the steps of a stretch take from the pool: arrays of shape (num_steps,).

    Attributes:
        num_free: free blocks after each step's schedule().
        num_evicted: cached blocks that each step reallocated.
    """

    num_free: IntArray
    num_evicted: IntArray


@dataclass(frozen=True, slots=True)
class Steps:
    """A stretch as it is recorded: the same batch at every step, each context one longer than at the step before.

    Attributes:
        requests: the batch, in the scheduler's order; not to be changed.
        cache_lens: tokens computed before the first step, per member.
        num_waiting: requests waiting all along.
        use: blocks.
    """

    requests: tuple[Request, ...]
    cache_lens: list[int]
    num_waiting: int
    use: BlockUse

    def plan(self, step: int) -> StepPlan:
        """One step by itself."""
        size = len(self.requests)
        return StepPlan(
            requests=list(self.requests),
            cache_lens=[cache_len + step for cache_len in self.cache_lens],
            input_lens=[1] * size,
            samples=[True] * size,
            preempted=[],
            num_waiting=self.num_waiting,
            num_running=size,
            num_free_blocks=int(self.use.num_free[step]),
            num_evicted_blocks=int(self.use.num_evicted[step]),
        )


def follows(plans: Iterable[StepPlan], running: Sequence[Request]) -> bool:
    """Whether what is in flight is the very batch that a stretch would go on with."""
    return all(plan.requests == running and all(plan.samples) for plan in plans)


def num_steady_steps(scheduler: VllmScheduler) -> int:
    """For how many steps from now on every running request decodes one token and nothing else happens.

    That holds while nobody finishes, the blocks suffice, and the head of the waiting queue stays where it is. It
    stays: during a stretch free blocks only become fewer, its prefix hits only get evicted, and the budget that is
    left does not change.
    """
    running, config = scheduler.running, scheduler.config
    if not running or len(running) > config.max_num_batched_tokens:
        return 0
    steps = MAX_STEPS
    for request in running:
        if not _is_decoding(request, asynchronous=config.async_scheduling):
            return 0
        end = min(request.num_prompt_tokens + request.max_tokens, config.max_model_len)
        steps = min(steps, end - request.num_tokens - 1)
    if steps < MIN_STEPS or scheduler.could_admit_beside(len(running)):
        return 0
    free = scheduler.kv.pool.num_free
    if _num_new_blocks(running, steps, config.block_size) > free:
        # Not the most that would fit, but safe: no request crosses more than this many block boundaries.
        steps = min(steps, (free // len(running)) * config.block_size)
    return steps if steps >= MIN_STEPS else 0


def _is_decoding(request: Request, *, asynchronous: bool) -> bool:
    """Exactly one token to compute: the last one known, or with asynchronous scheduling the one in flight."""
    in_flight = 1 if asynchronous else 0
    return (
        request.num_output_tokens > 0
        and request.num_output_placeholders == in_flight
        and request.num_in_flight_tokens == in_flight
        and request.num_stale_output_tokens == 0
        and request.num_computed_tokens == request.num_tokens - 1 + in_flight
    )


def _num_new_blocks(running: Sequence[Request], steps: int, block_size: int) -> int:
    return sum(
        max(0, ceil_div(request.num_computed_tokens + steps, block_size) - len(request.blocks)) for request in running
    )


def batches(running: Sequence[Request], count: int) -> BatchStats:
    """Statistics of the first `count` steps of a stretch: every context grows by one per step."""
    row = BatchStats.of_batch([request.num_computed_tokens for request in running], [1] * len(running)).table[0]
    ahead = np.arange(count, dtype=np.int64)
    size, context = row[COLUMNS.index("num_decode")], row[COLUMNS.index("decode_context")]
    table = np.repeat(row[np.newaxis], count, axis=0)
    table[:, COLUMNS.index("decode_context")] += size * ahead
    table[:, COLUMNS.index("decode_context_sq")] += 2 * context * ahead + size * ahead * ahead
    table[:, COLUMNS.index("decode_context_max")] += ahead
    return BatchStats(table)


def advance(scheduler: VllmScheduler, steps: int) -> BlockUse:
    """Let every running request decode `steps` tokens, as so many calls of schedule() and update() would."""
    pool, block_size = scheduler.kv.pool, scheduler.config.block_size
    evicted = np.zeros(steps, dtype=np.int64)
    taken = np.zeros(steps, dtype=np.int64)
    for step, request in _block_order(scheduler.running, steps, block_size):
        before = pool.num_evicted
        request.blocks += pool.allocate(1)
        taken[step] += 1
        evicted[step] += pool.num_evicted - before
    for request in scheduler.running:
        request.num_computed_tokens += steps
        request.num_output_tokens += steps
        scheduler.kv.cache_known(request)
    # num_free is what is left at the end: earlier steps had what later ones took.
    later = taken[::-1].cumsum()[::-1] - taken
    return BlockUse(num_free=pool.num_free + later, num_evicted=evicted)


def _block_order(running: Sequence[Request], steps: int, block_size: int) -> list[tuple[int, Request]]:
    """(step, request) of every block that is needed, in the order in which single steps would allocate."""
    needs = []
    for place, request in enumerate(running):
        first = len(request.blocks) * block_size - request.num_computed_tokens
        needs += [(step, place) for step in range(first, steps, block_size)]
    needs.sort()
    return [(step, running[place]) for step, place in needs]
