"""Logs that begin in the middle: who was running already, who had gone, and from where nobody is left of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from kvtwin.traces.readers.text import MAX_TIME_NS
from kvtwin.traces.run import Run
from kvtwin.validate.scheduler.lists import chunks, flat

IntArray = npt.NDArray[np.int64]

_NEVER = -1
_SOON = 4  # steps within which a request that runs already has its turn


@dataclass(frozen=True)
class Beginning:
    """What the engine was at before a log begins.

    Attributes:
        running: rows of the requests that ran already, in the order in which they first appear.
        num_computed: tokens that each of them had computed by then.
        gone: rows of the requests that came before the log begins and are in none of its steps.
        first_step, last_step: by row of the requests, its first and last step; -1 where it is in none.
    """

    running: IntArray
    num_computed: IntArray
    gone: IntArray
    first_step: IntArray
    last_step: IntArray

    @property
    def is_whole(self) -> bool:
        """Whether the log begins with an idle engine."""
        return not len(self.running) and not len(self.gone)

    def quiet_step(self) -> int | None:
        """The first step at which all that took part in earlier ones has ended; None if there is none."""
        seen = self.first_step != _NEVER
        num_steps = int(self.last_step.max(initial=_NEVER)) + 1
        # At step k run those that began before it and end at it or later.
        change = np.bincount(self.first_step[seen] + 1, minlength=num_steps + 2)[: num_steps + 1]
        change = change - np.bincount(self.last_step[seen] + 1, minlength=num_steps + 2)[: num_steps + 1]
        quiet = np.flatnonzero(np.cumsum(change)[1:num_steps] == 0) + 1
        begun = int(self.last_step[self.running].max(initial=_NEVER))
        quiet = quiet[quiet > begun]
        return int(quiet[0]) if len(quiet) else None


def read_beginning(run: Run, queued_ns: IntArray, *, prefix_caching: bool) -> Beginning:
    """How a log begins.

    A request ran already if it was scheduled before the log's first step. Where no earlier schedule() call is recorded
    than that of the step in which it first appears: if it appears soon and has more tokens computed then than a cache
    hit explains, any without prefix caching, its whole prompt with it.

    Args:
        run: with at least one step.
        queued_ns: when each request reached the engine.
        prefix_caching: whether a request can begin with cached tokens.
    """
    first_step, last_step, first_cached, rank = appearances(run)
    steps, requests = run.steps, run.requests
    scheduled_ns = requests.column("scheduled_ns").fill_null(MAX_TIME_NS).to_numpy()
    sched_ns = pc.coalesce(steps.column("sched_ns"), steps.column("start_ns")).to_numpy()
    begins_ns = int(sched_ns[0])
    unrecorded = (scheduled_ns >= sched_ns[first_step]) & (first_step < _SOON)
    too_far = (first_cached >= requests.column("input_tokens").to_numpy()) | (not prefix_caching)
    ran = (first_cached > 0) & ((scheduled_ns < begins_ns) | (unrecorded & too_far))
    running = np.flatnonzero(ran)
    running = running[np.argsort(rank[running], kind="stable")]
    in_middle = len(running) > 0 or steps.column("step")[0].as_py() > 0
    gone = np.flatnonzero((first_step == _NEVER) & (queued_ns < begins_ns)) if in_middle else running[:0]
    return Beginning(running, first_cached[running], gone, first_step, last_step)


def appearances(run: Run) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """By row of the requests: first step, last step, tokens computed before the first, and rank of first appearance."""
    first, last, cached, rank = (np.full(run.requests.num_rows, _NEVER, np.int64) for _ in range(4))
    num_before = 0
    for start, part in chunks(run.steps):
        rows, counts = flat(part.column("request"))
        cache_len, _ = flat(part.column("cache_len"))
        step = np.repeat(np.arange(start, start + part.num_rows), counts)
        last[rows] = step
        found, place = np.unique(rows, return_index=True)
        is_new = first[found] == _NEVER
        found, place = found[is_new], place[is_new]
        first[found], cached[found], rank[found] = step[place], cache_len[place], num_before + place
        num_before += len(rows)
    return first, last, cached, rank
