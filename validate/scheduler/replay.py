"""Replay a recorded scheduler log through the simulated scheduler, so that only decisions differ.

The simulated scheduler is called when the recorded one was, with the requests that had reached the engine by then, and
gets a batch's tokens when the recorded one got those of its batch. Neither step times nor host times are simulated, so
a scheduler that once decided otherwise is not late for ever: it meets the recording again as soon as its queues do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from kvtwin.sim.engines import EngineConfig
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.workload import prefix_nodes
from kvtwin.validate.scheduler.partial import appearances, read_beginning
from kvtwin.validate.scheduler.slots import Slots, read_slots

IntArray = npt.NDArray[np.int64]

# Keys of RunInfo.source, absent where there is nothing to say: what the replay had to assume, and the recording's step that it begins with (else 0).
NOTES: Final = "replay_notes"
FIRST_STEP: Final = "replay_first_step"
# The recording's step from which on too much is unknown to judge it, and what.
END_STEP: Final = "replay_end_step"
END_REASON: Final = "replay_end_reason"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step was scheduled, started, ended, and its tokens taken in, in ns."""

    sched_ns: int
    start_ns: int
    end_ns: int
    update_ns: int


class ReplayEngine(Protocol):
    """A simulated scheduler whose clock somebody else holds. Requests are named by their row."""

    depth: int
    """Most batches in flight: 2 where a step is scheduled before the tokens of the one before are known."""

    blocks: bool
    """Whether schedule() may wait for transfers: a recorded sched_ns is then its end, and it began as soon as it could."""

    turns_idle: bool
    """Whether schedule() is called once more before an idle engine waits for an arrival."""

    def add(self, row: int, time_ns: int, now_ns: int) -> None:
        """A request that has reached the engine at `time_ns` is taken in by its loop, now."""

    def schedule(self, times: StepTimes) -> bool:
        """Call the scheduler; whether it formed a batch."""

    def update(self, time_ns: int) -> None:
        """The oldest batch in flight has run."""

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""

    @property
    def is_busy(self) -> bool:
        """Whether the recording shows every call from now on: requests run, or wait for nothing but their turn."""

    @property
    def is_held_up(self) -> bool:
        """Whether requests wait, and schedule() can admit none of them now."""

    def next_event_ns(self) -> int | None:
        """When the next transfer ends, if nothing runs and something waits; now, if a call is due without one; else None."""

    def run(self) -> Run:
        """What was decided."""


def replay_schedule(measured: Run, config: EngineConfig, *, hits: IntArray | None = None) -> Run:
    """Serve a recording's requests with the simulated scheduler, at the recording's own times.

    Args:
        measured: a recorded (or simulated) run with steps, of one engine; it may begin or end in the middle.
        config: the engine's settings.
        hits: blocks that each request hits at its first admission, by row, instead of what the simulated cache holds;
            vLLM only.

    Returns:
        A simulated Run with steps; a request that the log leaves unfinished has no `finish_ns`. What had to be assumed
        is listed in `info.source["replay_notes"]`.

    Raises:
        InputError: no steps, several instances, or requests that the engine would refuse.
        KvtwinError: SGLang itself would stop.
    """
    refuse_unusable(measured)
    if isinstance(config, VllmConfig):
        return _replay_vllm(measured, config, hits)
    return _replay_sglang(measured, config)


def _replay_vllm(measured: Run, config: VllmConfig, hits: IntArray | None) -> Run:
    from kvtwin.validate.scheduler.replay_vllm import VllmReplay

    slots = read_slots(measured, asynchronous=config.async_scheduling)
    beginning = read_beginning(measured, queued_ns(measured), prefix_caching=config.enable_prefix_caching)
    engine, notes = VllmReplay(measured, config, hits), []
    if not beginning.is_whole:
        engine.resume(beginning, int(slots.sched_ns[0]))
        notes.append(
            f"the log begins in the middle: {len(beginning.running)} requests ran already, taken over as they first "
            "appear; what the prefix cache held and in which order the others waited is unknown"
        )
    return _drive(engine, measured, slots, [*beginning.running, *beginning.gone], notes)


def _replay_sglang(measured: Run, config: SglangConfig) -> Run:
    run = _replay_best(measured, config)
    end = None if config.disable_radix_cache else _first_unknown_hit(measured)
    if end is not None:
        reason = (
            "a request hits more than recorded prompts begin alike: block_hashes or output_block_hashes are missing"
        )
        run.info.source.update({END_STEP: end, END_REASON: reason})  # type: ignore[attr-defined]
    return run


def _first_unknown_hit(measured: Run) -> int | None:
    """The first step of a request that hits a prefix of which the recording does not say whose it is.

    That is more than it shares with a prompt that came first, to the block, where not all answers are known. What
    follows depends on it.
    """
    requests, block_tokens = measured.requests, measured.info.hash_block_tokens or 1
    if not requests.column("output_block_hashes").null_count:
        return None
    first_step, _, cached, _ = appearances(measured)
    chains = prefix_nodes(requests)
    explained, seen = np.zeros(len(chains), np.int64), set[int]()
    for row in np.argsort(first_step, kind="stable").tolist():
        num_shared = sum(1 for _ in takewhile(seen.__contains__, chains[row]))
        explained[row] = num_shared * block_tokens + block_tokens - 1
        if first_step[row] >= 0:
            seen.update(chains[row])
    explained[requests.column("block_hashes").is_null().to_numpy()] = 0
    steps = first_step[cached > explained]
    return int(steps.min()) if len(steps) else None


def _replay_best(measured: Run, config: SglangConfig) -> Run:
    """As a server, whose idle loop turns on, or, where more of the log agrees with it, as on a virtual clock."""
    run = _replay_turning(measured, config, turns_idle=True)
    agreed = _num_agreed(measured, run)
    if config.disable_overlap_schedule or agreed == measured.steps.num_rows:
        return run
    other = _replay_turning(measured, config, turns_idle=False)
    if _num_agreed(measured, other) <= agreed:
        return run
    note = "a loop with nothing to do did not turn before the next arrival, as on a virtual clock: read from the log"
    other.info.source[NOTES].append(note)
    return other


def _num_agreed(measured: Run, run: Run) -> int:
    """Steps before the first with another batch."""
    first = int(run.info.source.get(FIRST_STEP, 0))
    columns = ("request", "cache_len", "input_len")
    one, two = (
        zip(*(side.column(name).to_pylist() for name in columns), strict=True)
        for side in (measured.steps.slice(first), run.steps)
    )
    return first + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _replay_turning(measured: Run, config: SglangConfig, *, turns_idle: bool) -> Run:
    from kvtwin.validate.scheduler.replay_sglang import SglangReplay

    slots = read_slots(measured, asynchronous=not config.disable_overlap_schedule)
    beginning = read_beginning(measured, queued_ns(measured), prefix_caching=not config.disable_radix_cache)
    engine = SglangReplay(measured, config, turns_idle=turns_idle)
    if beginning.is_whole:
        return _drive(engine, measured, slots, (), engine.notes)
    first = beginning.quiet_step()
    if first is None:
        problem = "the log begins in the middle, and at each of its steps something runs on: no place to begin a replay"
        raise InputError(problem, path=measured.path)
    earlier = np.flatnonzero((beginning.first_step >= 0) & (beginning.first_step < first))
    note = f"the log begins in the middle: judged from step {first} on, where nothing of before runs any more"
    run = _drive(engine, measured, slots.since(first), [*earlier, *beginning.gone], [*engine.notes, note])
    run.info.source[FIRST_STEP] = first  # type: ignore[index]
    return run


def queued_ns(measured: Run) -> IntArray:
    """When each request reached the engine's queue: when its loop took it, else when the client sent it."""
    requests = measured.requests
    times: IntArray = pc.coalesce(requests.column("queued_ns"), requests.column("arrival_ns")).to_numpy()
    return times


def refuse_unusable(run: Run) -> None:
    """Refuse a run without steps, or of several engines.

    Raises:
        InputError: says which.
    """
    if not run.steps.num_rows:
        raise InputError("the steps table is empty", path=run.path)
    if len(pc.unique(run.steps.column("instance").drop_null())) > 1:
        raise InputError("steps of several instances: compare one engine at a time", path=run.path, column="instance")


class _Loop:
    """The engine's loop, with the recording's clock."""

    def __init__(self, engine: ReplayEngine, measured: Run, rows: IntArray) -> None:
        queued = queued_ns(measured)
        order = rows[np.argsort(queued[rows], kind="stable")]
        self._engine = engine
        self._coming = deque(zip(order.tolist(), queued[order].tolist(), strict=True))
        self._in_flight: deque[StepTimes] = deque()
        self._now_ns = -(1 << 62)

    def take(self, times: StepTimes) -> None:
        """A schedule() call that the recording shows."""
        may_try = self._engine.depth > 1
        while self._in_flight and self._in_flight[0].update_ns <= times.sched_ns:
            if may_try and len(self._in_flight) < self._engine.depth:
                # The real loop tried to fill its queue of batches before it waited. It had nothing to schedule, or was
                # still at it when the batch before had run.
                update_ns = self._in_flight[0].update_ns
                idle = StepTimes(self._now_ns, update_ns, update_ns, update_ns)
                may_try = not self._call(replace(times, sched_ns=self._now_ns) if self._engine.blocks else idle)
                if self._engine.blocks and not may_try:
                    self._now_ns = max(self._now_ns, times.sched_ns)
                    return
            self._update()
        if not self._wait(times):
            if not self._engine.blocks:
                self._now_ns = max(self._now_ns, times.sched_ns)
            self._call(times if times.sched_ns <= self._now_ns else replace(times, sched_ns=self._now_ns))
        self._now_ns = max(self._now_ns, times.sched_ns)

    def _wait(self, times: StepTimes) -> bool:
        """Until a recorded call, an engine that waits for transfers looks again whenever one ends, or a request comes.

        Returns:
            Whether it formed a batch meanwhile, which takes the place of the recorded one.
        """
        while not self._in_flight and not self._engine.is_busy:
            event_ns = self._engine.next_event_ns()
            events_ns = [] if event_ns is None else [event_ns]
            if self._coming:
                events_ns.append(max(self._coming[0][1], self._now_ns))
            is_due = event_ns is not None and event_ns <= self._now_ns
            if not is_due and (not events_ns or min(events_ns) >= times.sched_ns + self._engine.blocks):
                return False
            self._now_ns = min(events_ns)
            self._add_arrived()
            may_look = self._now_ns == event_ns or self._engine.blocks or self._engine.is_held_up
            if may_look and self._call(replace(times, sched_ns=self._now_ns)):
                return True
        return False

    def take_missing(self, following: StepTimes, is_last: bool) -> None:
        """A schedule() call that the recording lacks, some time before the step that follows."""
        while len(self._in_flight) >= self._engine.depth:
            self._update()
        in_flight_after = is_last and self._engine.depth > 1
        update_ns = following.sched_ns + 1 if in_flight_after else following.sched_ns
        self._call(StepTimes(self._now_ns, self._now_ns, following.start_ns, update_ns))

    def drain(self) -> None:
        """The log ends: what is in flight still runs."""
        while self._in_flight:
            self._update()

    def _call(self, times: StepTimes) -> bool:
        self._add_arrived()
        formed = self._engine.schedule(times)
        if formed:
            self._in_flight.append(times)
        return formed

    def _update(self) -> None:
        self._now_ns = max(self._now_ns, self._in_flight.popleft().update_ns)
        self._engine.update(self._now_ns)
        has_come = self._coming and self._coming[0][1] <= self._now_ns
        may_turn = self._engine.turns_idle and not self._in_flight and not has_come
        if may_turn and (self._engine.is_idle or self._engine.is_held_up):
            self._call(StepTimes(self._now_ns, self._now_ns, self._now_ns, self._now_ns))

    def _add_arrived(self) -> None:
        while self._coming and self._coming[0][1] <= self._now_ns:
            self._engine.add(*self._coming.popleft(), self._now_ns)


def _drive(engine: ReplayEngine, measured: Run, slots: Slots, begun: Sequence[int], notes: Sequence[str]) -> Run:
    """Call an engine as the slots say; requests that have `begun` are not queued."""
    rows = np.setdiff1d(np.arange(measured.requests.num_rows), np.array(begun, np.int64))
    loop = _Loop(engine, measured, rows)
    columns = (slots.sched_ns, slots.start_ns, slots.end_ns, slots.update_ns, slots.num_missing)
    for sched_ns, start_ns, end_ns, update_ns, num_missing in zip(*(c.tolist() for c in columns), strict=True):
        times = StepTimes(sched_ns, start_ns, end_ns, max(update_ns, sched_ns))
        for left in range(num_missing, 0, -1):
            loop.take_missing(times, left == 1)
        loop.take(times)
    loop.drain()
    run = engine.run()
    run.info.source[NOTES] = [*slots.notes, *notes]  # type: ignore[index]
    return run
