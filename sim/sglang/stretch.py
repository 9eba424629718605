"""Decode steps that change nothing but counters, taken many at a time, equal to single steps bit for bit.

Between two events the running requests decode together: nobody joins or ends, no page is evicted. Each context grows by
one token a step, so a batch's statistics and the pages it begins follow in closed form from the first step's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvtwin.sim.latency.stats import IntArray
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.scheduler import SglangScheduler


@dataclass(slots=True, eq=False)
class Stretch:
    """Alike decode steps, as they were launched.

    Attributes:
        requests: the batch of every step.
        first_cache_lens: each request's tokens with KV before the first step.
        sched_ns, start_ns, end_ns, now_ns: times of each step; `now_ns` is when the loop goes on after launching it.
        available: free tokens of the pool after forming each step.
        ratios: new_token_ratio after forming each step.
    """

    requests: list[SglangRequest]
    first_cache_lens: list[int]
    sched_ns: list[int]
    start_ns: list[int]
    end_ns: list[int]
    now_ns: list[int]
    available: list[int]
    ratios: list[float]

    def __len__(self) -> int:
        return len(self.end_ns)

    def cache_lens(self, step: int) -> list[int]:
        """Tokens with KV before a step, per request."""
        return [length + step for length in self.first_cache_lens]


def num_steady_steps(scheduler: SglangScheduler, most: int) -> int:
    """Steps that can be taken before a request ends or memory gets tight, at most `most`; 0 if a prefill may come."""
    if not scheduler.only_decodes():
        return 0
    running = scheduler.running
    steps = min(most, min([request.max_new_tokens - request.num_outputs for request in running]) - 1)
    if steps <= 0 or not scheduler.make_room():
        return 0
    size, available = scheduler.pool.page_size, scheduler.pool.available
    # Nothing more is evicted as long as there is this much: a decode asks for a page per request, needed or not.
    spare = available - len(running) * size
    if spare < 0:
        return _steps_without_eviction(scheduler, steps)
    if size == 1:
        return min(steps, spare // len(running) + 1)
    if spare >= len(running) * size * (steps // size + 1):
        return steps
    begun = np.cumsum(size * pages_begun([request.kv_len for request in running], size, steps))
    return min(steps, int(np.searchsorted(begun, spare, side="right")) + 1)


def _steps_without_eviction(scheduler: SglangScheduler, most: int) -> int:
    """Steps that can be taken where a decode asks for more than there is, and evicts in vain: nothing can go.

    Until somebody is retracted, that is: when the pages that a step is expected to begin are not there any more.
    """
    if scheduler.cache.evictable_size() > 0:
        return 0
    size, running = scheduler.pool.page_size, scheduler.running
    begun = size * pages_begun([request.kv_len for request in running], size, most)
    asked = np.maximum(begun, size * pages_begun(scheduler.expected_lens(running), size, most))
    lacking = np.flatnonzero(np.cumsum(begun) - begun + asked > scheduler.pool.available)
    return int(lacking[0]) if len(lacking) else most


def pages_begun(kv_lens: list[int], page_size: int, num_steps: int) -> IntArray:
    """Pages that each of `num_steps` decode steps begins: how many contexts cross a page boundary."""
    by_residue = np.bincount(np.array(kv_lens) % page_size, minlength=page_size)
    result: IntArray = by_residue[-np.arange(num_steps) % page_size]
    return result


def decode_sums(cache_lens: list[int], *, spread: bool) -> tuple[int, int, int, int]:
    """Members, context, squares and largest context of a batch of decodes; without `spread` the last two are 0."""
    total = sum(cache_lens)
    if not spread:
        return len(cache_lens), total, 0, 0
    return len(cache_lens), total, sum([length * length for length in cache_lens]), max(cache_lens)


def advance(scheduler: SglangScheduler, num_steps: int, *, record: bool) -> tuple[list[int], list[float]]:
    """Take `num_steps` steps; with `record`, returns the free tokens and the ratio after each."""
    running, pool = scheduler.running, scheduler.pool
    available: list[int] = []
    if record:
        begun = pages_begun([request.kv_len for request in running], pool.page_size, num_steps)
        available = (pool.available - pool.page_size * np.cumsum(begun)).tolist()
    scheduler.prepare_preemption()
    size, pages = pool.page_size, 0
    for request in running:
        before = request.kv_len
        request.kv_len = after = before + num_steps
        request.num_outputs += num_steps
        pages += (after - 1) // size - (before - 1) // size
    pool.available -= size * pages
    ratios = list(_decayed(scheduler, num_steps))
    scheduler.new_token_ratio = ratios[-1]
    return available, ratios


def _decayed(scheduler: SglangScheduler, num_steps: int) -> Iterator[float]:
    ratio = scheduler.new_token_ratio
    for step in range(num_steps):
        if ratio <= scheduler.min_ratio:
            yield from [scheduler.min_ratio] * (num_steps - step)
            return
        ratio = max(ratio - scheduler.ratio_decay, scheduler.min_ratio)
        yield ratio
