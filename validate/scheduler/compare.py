"""Two step sequences side by side: how many steps agree, where they part, and when they meet again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.validate.gates import NO_GATES, Gates
from kvtwin.validate.result import Check, Divergence, ScheduleFinding
from kvtwin.validate.scheduler.align import NO_STEP, Alignment, align
from kvtwin.validate.scheduler.checks import ScheduleChecks, free_blocks
from kvtwin.validate.scheduler.decisions import LISTS, NOT_THERE, Decisions, IntArray, common_names, read_decisions
from kvtwin.validate.scheduler.replay import END_REASON, END_STEP, FIRST_STEP, NOTES, refuse_unusable

BoolArray = npt.NDArray[np.bool_]

_COUNTS: Final = ("num_waiting", "num_running", "num_free_blocks")


def compare_schedulers(
    measured: Run, simulated: Run, *, name: str, gates: Gates = NO_GATES
) -> tuple[ScheduleFinding, list[Check]]:
    """Compare the decisions of two runs of one workload.

    Args:
        measured: recorded run with steps, of one engine.
        simulated: the replay of it (`replay_schedule`), or any other run with steps of the same requests.
        name: the recorded run's name.
        gates: see `gates.parse_gates`.

    Returns:
        The finding, and judged checks: identical steps, free blocks, time in queues, orders, sizes.

    Raises:
        InputError: a run without steps, of several instances, or no request in common.
    """
    for run in (measured, simulated):
        refuse_unusable(run)
    first_step = int(simulated.info.source.get(FIRST_STEP, 0))
    end_step, num_steps = simulated.info.source.get(END_STEP), measured.steps.num_rows
    if end_step is not None:
        if end_step <= first_step:
            raise InputError(f"no step can be judged: {simulated.info.source[END_REASON]}", path=measured.path)
        simulated = _with_steps(simulated, simulated.steps.slice(0, end_step - first_step))
    if first_step or end_step is not None:
        measured = _with_steps(measured, measured.steps.slice(first_step, (end_step or num_steps) - first_step))
    names = common_names(measured, simulated)
    common = np.intersect1d(*names, assume_unique=True, return_indices=True)[1:]
    if not len(common[0]):
        raise InputError("no request id in common: not the same workload", path=simulated.path)
    ours, theirs = (read_decisions(run, numbers) for run, numbers in zip((measured, simulated), names, strict=True))
    rows = align(ours.members, theirs.members)
    same = _is_same(rows, ours, theirs)
    checks = ScheduleChecks(name, gates)
    checks.add_steps(rows, same, ours, theirs)
    if end_step is None:
        checks.add_residency(measured, simulated, common)
        checks.add_orders(measured, simulated, common)
    else:
        reason = simulated.info.source[END_REASON]
        checks.not_judged.append(f"steps {end_step} to {num_steps - 1}, times in queues and orders: {reason}")
    checks.add_sizes(rows, ours, theirs)
    starts, ends = _episodes(same)
    finding = ScheduleFinding(
        run=name,
        num_steps=len(rows),
        num_identical=int(same.sum()),
        first=_moved(_first(starts, ends, rows, measured, simulated), first_step),
        not_judged=(*_unknown(measured, simulated), *checks.not_judged, *simulated.info.source.get(NOTES, ())),
        num_episodes=len(starts),
        longest_episode=int((ends - starts).max(initial=0)),
        first_free_blocks=_moved(_first_free_blocks(rows, same, ours, theirs, measured, simulated), first_step),
    )
    return finding, checks.checks


def _with_steps(run: Run, steps: pa.Table) -> Run:
    return Run(run.info, {"requests": run.requests, "steps": steps}, name=str(run.path))


def _is_same(rows: Alignment, ours: Decisions, theirs: Decisions) -> BoolArray:
    """Per row of the alignment: both decided the same, as far as both recorded it."""
    same = rows.is_pair.copy()
    one, other = rows.measured[same], rows.simulated[same]
    agree = ours.batch[one] == theirs.batch[other]
    for name in LISTS:
        known = ours.is_known[name][one] & theirs.is_known[name][other]
        agree &= ~known | (ours.lists[name][one] == theirs.lists[name][other])
    same[same] = agree
    return same


def _episodes(same: BoolArray) -> tuple[IntArray, IntArray]:
    """First row of each stretch of rows that differ, and the row after its last."""
    edges = np.diff(np.concatenate(([True], same, [True])).astype(np.int8))
    return np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)


def _moved(found: Divergence | None, by: int) -> Divergence | None:
    """With steps counted from the log's first, where only those after `by` were compared."""
    if found is None or not by:
        return found
    measured = {**found.measured, "step": found.measured["step"] + by} if found.measured else found.measured
    resync = None if found.resync_step is None else found.resync_step + by
    return replace(found, step=found.step + by, measured=measured, resync_step=resync)


def _first(starts: IntArray, ends: IntArray, rows: Alignment, measured: Run, simulated: Run) -> Divergence | None:
    """The first divergence."""
    if not len(starts):
        return None
    row, end = int(starts[0]), int(ends[0])
    step, twin = int(rows.measured[row]), int(rows.simulated[row])
    ours, theirs = _step(measured, step), _step(simulated, twin)
    resync = rows.measured[end:]
    return Divergence(
        step=step if step != NO_STEP else _next_step(rows, row, measured),
        what=_what(ours, theirs),
        measured=ours,
        simulated=theirs,
        resync_step=int(resync[0]) if len(resync) else None,
    )


def _next_step(rows: Alignment, row: int, measured: Run) -> int:
    """The step of the measured run before which a step stands that it lacks; its last step + 1 at the end."""
    later = rows.measured[row:]
    later = later[later != NO_STEP]
    return int(later[0]) if len(later) else measured.steps.num_rows


def _first_free_blocks(
    rows: Alignment, same: BoolArray, ours: Decisions, theirs: Decisions, measured: Run, simulated: Run
) -> Divergence | None:
    free, other = free_blocks(rows, same, ours, theirs)
    differ = (free != other) & (free != NOT_THERE) & (other != NOT_THERE)
    if not differ.any():
        return None
    first = int(np.argmax(differ))
    agree = np.flatnonzero(~differ[first:])
    steps, twins = rows.measured[same], rows.simulated[same]
    return Divergence(
        step=int(steps[first]),
        what="free blocks",
        measured=_step(measured, int(steps[first])),
        simulated=_step(simulated, int(twins[first])),
        resync_step=int(steps[first + agree[0]]) if len(agree) else None,
    )


def _step(run: Run, step: int) -> Mapping[str, Any]:
    """A step as it was decided, with request ids; empty where there is none."""
    if step == NO_STEP:
        return {}
    row = run.steps.slice(step, 1).to_pylist()[0]
    ids = run.requests.column("request_id")

    def named(requests: list[int] | None) -> list[str] | None:
        return None if requests is None else [ids[request].as_py() for request in requests]

    batch = zip(named(row["request"]) or (), row["cache_len"], row["input_len"], strict=True)
    return {
        "step": step,
        "batch": [list(member) for member in batch],
        **{name: named(row[name]) for name in LISTS},
        **{name: row[name] for name in _COUNTS},
    }


def _what(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first thing that differs between two steps, from the coarse to the fine."""
    if not ours or not theirs:
        return "step not recorded" if theirs else "step not simulated"
    members, others = ({name: rest for name, *rest in step["batch"]} for step in (ours, theirs))
    if members.keys() != others.keys():
        return "members"
    for place, column in enumerate(("cache_len", "input_len")):
        if any(members[name][place] != others[name][place] for name in members):
            return column
    if ours["batch"] != theirs["batch"]:
        return "order"
    return next(name for name in LISTS if ours[name] != theirs[name] and None not in (ours[name], theirs[name]))


def _unknown(measured: Run, simulated: Run) -> list[str]:
    """What the steps of the runs leave out."""
    found = []
    for who, run in (("measured", measured), ("simulated", simulated)):
        for name in (*LISTS, *_COUNTS):
            nulls = run.steps.column(name).null_count
            if nulls:
                share = "" if nulls == run.steps.num_rows else f" in {nulls:,} of {run.steps.num_rows:,} steps"
                found.append(f"{name}: not recorded by the {who} run{share}")
    return found
