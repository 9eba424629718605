"""When a recorded engine called its scheduler, and where its log has holes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.traces.run import Run
from kvtwin.validate.scheduler.lists import chunks, flat

IntArray = npt.NDArray[np.int64]

_NEAR = 8  # steps around a context that seems to have jumped, in which it may turn up out of order
_MAX_HOLE = 10_000  # steps: a longer hole is not filled


@dataclass(frozen=True)
class Slots:
    """The schedule() calls of a log, by time.

    Attributes:
        sched_ns, start_ns, end_ns, update_ns: of each step: schedule() is called, the model starts, its tokens are
            back, the scheduler has taken them in.
        num_missing: steps that the log lacks just before each.
        notes: what had to be assumed, in words.
    """

    sched_ns: IntArray
    start_ns: IntArray
    end_ns: IntArray
    update_ns: IntArray
    num_missing: IntArray
    notes: tuple[str, ...]

    def since(self, step: int) -> Slots:
        """Only the slots from a step on."""
        return Slots(
            self.sched_ns[step:],
            self.start_ns[step:],
            self.end_ns[step:],
            self.update_ns[step:],
            self.num_missing[step:],
            self.notes,
        )


def read_slots(run: Run, *, asynchronous: bool) -> Slots:
    """The slots of a recorded run.

    Args:
        run: with steps.
        asynchronous: the engine schedules a step before it has the tokens of the one before.
    """
    steps, notes = run.steps, []
    if run.requests.column("queued_ns").null_count:
        notes.append("queued_ns is not recorded: requests count as queued when they were sent (arrival_ns)")
    start_ns, end_ns = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    update_ns, known = _times(steps, "update_ns", end_ns)
    if not known:
        notes.append("update_ns is not recorded: tokens count as taken in at end_ns")
    sched_ns, known = _times(steps, "sched_ns", _guess_sched(start_ns, end_ns) if asynchronous else start_ns)
    if not known:
        said = "the end of the step before last" if asynchronous else "start_ns"
        notes.append(f"sched_ns is not recorded: schedule() counts as called at {said}")
    elif schedules_ahead(run) not in (asynchronous, None):
        notes.append(
            "the engine is to schedule steps ahead, and the log shows none that was"
            if asynchronous
            else "the log shows steps scheduled ahead, and the engine is to schedule none"
        )
    times = (sched_ns, start_ns, end_ns, update_ns)
    if (np.diff(sched_ns) < 0).any():
        row = int(np.flatnonzero(np.diff(sched_ns) < 0)[0]) + 1
        notes.append(f"the log is out of order: step {row} was scheduled before the row above it")
        order = np.argsort(sched_ns, kind="stable")
        times = (sched_ns[order], start_ns[order], end_ns[order], update_ns[order])
    num_missing = _holes(run)
    if num_missing.any():
        rows = np.flatnonzero(num_missing)
        notes.append(f"{num_missing.sum()} steps are missing from the log, the first before row {rows[0]}")
    return Slots(*times, num_missing, tuple(notes))


def schedules_ahead(run: Run) -> bool | None:
    """Whether the engine scheduled steps before the one before had ended; None where the log does not tell."""
    sched_ns = run.steps.column("sched_ns")
    if sched_ns.null_count or len(sched_ns) < 2 or (np.diff(sched_ns.to_numpy()) < 0).any():
        return None
    return bool((sched_ns.to_numpy()[1:] < run.steps.column("end_ns").to_numpy()[:-1]).any())


def _times(steps: pa.Table, name: str, otherwise: IntArray) -> tuple[IntArray, bool]:
    """A column with its nulls replaced, and whether it had none."""
    column = steps.column(name)
    if not column.null_count:
        return column.to_numpy(), True
    known = column.is_valid().to_numpy()
    times: IntArray = np.where(known, column.fill_null(0).to_numpy(), otherwise)
    return times, False


def _guess_sched(start_ns: IntArray, end_ns: IntArray) -> IntArray:
    """With two batches in flight a step is scheduled when the one before last has ended, and after an idle device when
    it starts."""
    if len(start_ns) < 2:
        return start_ns
    idle = np.concatenate(([True], start_ns[1:] - end_ns[:-1] > np.median(end_ns - start_ns) / 2))
    before_last = np.concatenate((start_ns[:1], start_ns[:1], end_ns[:-2]))
    return np.maximum.accumulate(np.where(idle, start_ns, np.minimum(before_last, start_ns)))


def _holes(run: Run) -> IntArray:
    """Steps that are missing just before each: by the step's number, or because a running request's context is longer
    than its last step left it."""
    steps = run.steps
    numbers = steps.column("step").to_numpy()
    missing = np.zeros(len(numbers), np.int64)
    if (np.diff(numbers) > 0).all():
        missing[1:] = np.minimum(np.diff(numbers) - 1, _MAX_HOLE)
    for row, jump in _jumps(run).items():
        missing[row] = max(missing[row], min(jump, _MAX_HOLE))
    return missing


def _jumps(run: Run) -> dict[int, int]:
    """Rows before which tokens were computed that no row shows, and in how many steps at least.

    A preemption or a cache hit never puts a request further than it was, so only a missing step can.
    """
    reached: IntArray = np.full(run.requests.num_rows, -1, np.int64)  # tokens computed, -1: not seen yet
    found: dict[int, int] = {}
    for first, part in chunks(run.steps):
        request, counts = flat(part.column("request"))
        cache_len, input_len = (flat(part.column(name))[0] for name in ("cache_len", "input_len"))
        row = np.repeat(np.arange(first, first + part.num_rows), counts)
        order = np.argsort(request, kind="stable")
        request, row, cache_len, end = request[order], row[order], cache_len[order], (cache_len + input_len)[order]
        is_first = np.diff(request, prepend=-1) != 0
        before = np.where(is_first, reached[request], np.concatenate(([0], end[:-1])) if len(end) else end)
        is_last = np.diff(request, append=-1) != 0
        reached[request[is_last]] = end[is_last]
        for place in np.flatnonzero((before >= 0) & (cache_len > before)).tolist():
            step = int(row[place])
            if not _turns_up(run.steps, step, int(request[place]), int(before[place])):
                jump = int(cache_len[place] - before[place])
                found[step] = min(found.get(step, jump), jump)
    return found


def _turns_up(steps: pa.Table, row: int, request: int, cache_len: int) -> bool:
    """Whether a step near a row goes on where a request was left: the log is out of order, not incomplete."""
    near = steps.slice(max(0, row - _NEAR), 2 * _NEAR).select(["request", "cache_len"]).to_pylist()
    return any((request, cache_len) in zip(step["request"], step["cache_len"], strict=True) for step in near)
