"""How much of each end-to-end error each simulated layer causes: a waterfall that adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.arrivals import turn_ns
from kvtwin.validate.attribution import clocks, evidence
from kvtwin.validate.attribution.hybrids import (
    HOST_AND_SCHEDULE,
    Stage,
    Twin,
    knows_calls,
    recorded_hits,
    replay,
    stages,
)
from kvtwin.validate.attribution.waterfall import UNITS, Chain, Side, with_hidden, without_trifles
from kvtwin.validate.beginning import beginning
from kvtwin.validate.e2e import Clock
from kvtwin.validate.result import Attribution, Check, ScheduleFinding
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.units import unit_note

REMAINDER: Final = "remainder"
_ENGINE: Final = "step times, host, schedule"  # where the recording has no steps
_ALL: Final = "arrival, step times, host, schedule"  # ... and does not say when requests reached the engine
MAX_STEPS: Final = 40_000  # recorded layers run in the plain loop, some 50 us a step


def attribute(
    measured: Run,
    twin: Twin,
    *,
    name: str,
    clock: Clock,
    checks: Sequence[Check] = (),
    schedule: ScheduleFinding | None = None,
    notes: Sequence[str] = (),
) -> list[Attribution]:
    """Replace one simulated layer after another by its recording and see what each changes.

    The layers and their order are `hybrids.stages`'. A part is what the error loses when its layer is recorded too, so
    the parts sum to the error exactly; the remainder is what the requests' own stamps differ from those of the steps
    that served them. The order matters where layers act on one another: a fault in an early layer takes with it what
    it does to the later ones.

    Args:
        measured: a recorded run; at most its first `MAX_STEPS` steps are looked at.
        twin: what predicts it.
        name: the recorded run's name.
        clock: see `e2e.request_metrics`.
        checks: of this run, those of the steps among them: evidence (`evidence.py`), noise floors.
        schedule: how the decisions compare at the recorded times; None to find out here.
        notes: what a reader must know of the twin.

    Returns:
        mean, p50, p90 of TTFT, TPOT and latency, and throughput, over the requests that all stages served; then each
        layer's own measure, as far as it is known.

    Raises:
        InputError: see `e2e.request_metrics`.
    """
    measured, twin, judged, cut = _beginning(measured, twin)
    truth, predicted = Side.of(measured, clock), Side.of(twin.run, clock)
    contradiction, unit = clocks.steps_and_requests(measured), _unit(measured, truth, predicted, checks)
    words = [*notes, *cut, *filter(None, (unit, contradiction)), *_step_units(checks)]
    steps = evidence.step_times(checks, contradiction or "")
    if unit is not None and not any(row.blamed for row in steps):
        # Nothing can be replayed at times of another unit, and no layer is at fault.
        chain = Chain((predicted, truth), [UNITS], judged, {UNITS}, "; ".join(words))
        return [*chain.attributions(name, checks), *steps]
    case = _Case.of(measured, twin)
    own = [
        *evidence.output_lengths(case.measured, case.twin, name),
        *evidence.arrival(case.measured, case.twin, case.shift_ns or case.predicted_shift_ns, checks, name),
        *steps,
        *_decisions(case, None if case.shift_ns else schedule, name),
    ]
    suspected = {row.blamed for row in own if row.blamed is not None} | (set() if contradiction else _host(own))
    found = list(stages(case.measured, case.twin, case.replayed))
    layers = _layers(found, measured)
    between = (Side.at(stage.requests, measured, clock, twin.host.output_ns) for stage in found[1:])
    note = "; ".join([*words, *case.notes, *_missing(layers)])
    chain = Chain((predicted, *between, truth), layers, judged, suspected, note)
    return with_hidden([*without_trifles(chain.attributions(name, checks)), *own], suspected)


@dataclass(frozen=True)
class _Case:
    """What is compared once the queue's clock is put right.

    Attributes:
        measured: the recording, with `queued_ns` by the clock of its dispatches.
        twin: its workload by the same clock.
        shift_ns, predicted_shift_ns: by how much the queue's clock of either run was off (`clocks.queue_shift`).
        replayed: the simulated scheduler under the recording's clock; None where the log cannot be replayed.
        notes: what a reader must know of all that.
    """

    measured: Run
    twin: Twin
    shift_ns: int
    predicted_shift_ns: int
    replayed: Run | None
    notes: Sequence[str]

    @classmethod
    def of(cls, measured: Run, twin: Twin) -> _Case:
        """The case of two runs as they are."""
        has_calls = knows_calls(measured, twin.config)
        dispatched_ns = clocks.dispatches(measured, has_calls=has_calls)
        shift_ns, predicted_shift_ns = _shifts(measured, twin.run, dispatched_ns)
        measured = clocks.with_queue_moved(measured, shift_ns, dispatched_ns)
        twin = replace(twin, workload=clocks.with_queue_moved(twin.workload, shift_ns, dispatched_ns))
        replayed, refused = _replay(measured, twin) if has_calls else (None, [])
        notes = [*refused, *_clock_note(shift_ns, "recorded"), *_clock_note(predicted_shift_ns, "predicted")]
        return cls(measured, twin, shift_ns, predicted_shift_ns, replayed, notes)


def _unit(measured: Run, truth: Side, predicted: Side, checks: Sequence[Check]) -> str | None:
    """A word where the requests' times are off by a unit's factor: beside the twin's, their own steps', or the plan's."""
    between = (unit_note(truth.times[key], predicted.times[key]) for key in ("latency", "ttft"))
    planned = (word for check in checks if check.metric == "identical_arrivals" for word in _words_on_units(check))
    return next(filter(None, (*between, clocks.unit_of_requests(measured), *planned)), None)


def _replay(measured: Run, twin: Twin) -> tuple[Run | None, list[str]]:
    """The simulated scheduler under the recording's clock; None, and why, where the log cannot be replayed."""
    try:
        return replay(measured, twin), []
    except InputError as error:
        return None, [f"decisions are not judged: {error.problem}"]


def _decisions(case: _Case, schedule: ScheduleFinding | None, name: str) -> list[Attribution]:
    """Decisions and hits by their own measure.

    A replay at guessed times decides otherwise for that alone, which is evidence against nobody.
    """
    measured, twin, replayed = case.measured, case.twin, case.replayed
    if replayed is None:
        return []
    schedule = schedule or compare_schedulers(measured, replayed, name=name)[0]
    with_hits, hits = None, recorded_hits(measured, twin)
    if schedule.num_identical < schedule.num_steps and hits is not None:
        with_hits = compare_schedulers(measured, replay(measured, twin, hits), name=name)[0]
    return evidence.decisions(measured, twin, replayed, schedule, with_hits)


def _host(own: Sequence[Attribution]) -> set[str]:
    """Where decisions are the same, whatever time is left over counts as the host's."""
    return {"host"} if any(row.metric == "identical_steps" and row.blamed is None for row in own) else set()


def _layers(found: Sequence[Stage], measured: Run) -> list[str]:
    """The bars' names: the stages', and what the last step to the measurement is."""
    layers = [stage.layer for stage in found[1:]]
    if "arrival" not in layers:
        return [*layers, _ALL]
    return [*layers, REMAINDER if measured.has("steps") else _ENGINE]


def _shifts(measured: Run, simulated: Run, dispatched_ns: npt.NDArray[np.float64]) -> tuple[int, int]:
    """By how much the queue's clock of either run is off that of its dispatches (`clocks.queue_shift`)."""
    recorded = clocks.waits(measured, dispatched_ns)
    predicted = clocks.waits(simulated, clocks.dispatches(simulated, has_calls=False))
    turn = turn_ns(measured)
    if not turn:
        return 0, 0
    return clocks.queue_shift(recorded, predicted, turn), clocks.queue_shift(predicted, recorded, turn)


def _clock_note(shift_ns: int, whose: str) -> list[str]:
    if not shift_ns:
        return []
    side = "before" if shift_ns > 0 else "after"
    return [
        f"{whose} queued_ns lies {abs(shift_ns) / NS_PER_MS:.3f} ms {side} where the dispatches of all requests put it"
    ]


def _step_units(checks: Sequence[Check]) -> list[str]:
    """Requests queue on wrong step times, so that their own times are off by no unit's factor."""
    words = {word for check in checks if check.level == "step" for word in _words_on_units(check)}
    return [f"step times: {word}" for word in sorted(words)]


def _words_on_units(check: Check) -> list[str]:
    return [word for word in check.note.split("; ") if "units taken" in word]


def _beginning(measured: Run, twin: Twin) -> tuple[Run, Twin, npt.NDArray[np.bool_], list[str]]:
    """Both runs, cut to the requests of the first steps where there are too many; which of them are judged; a note."""
    everyone = np.ones(measured.requests.num_rows, np.bool_)
    if not measured.has("steps") or measured.steps.num_rows <= MAX_STEPS:
        return measured, twin, everyone, []
    first, cut_ns = beginning(measured, MAX_STEPS)
    num_requests = first.requests.num_rows
    workload = Run(twin.workload.info, {"requests": twin.workload.requests.slice(0, num_requests)})
    run = Run(twin.run.info, {"requests": twin.run.requests.slice(0, num_requests)})
    # The later ones are there for the company they give; their own times end after the cut.
    judged = first.requests.column("finish_ns").fill_null(cut_ns).to_numpy() < cut_ns
    note = f"of the first {MAX_STEPS:,} steps: {int(judged.sum()):,} requests"
    return first, Twin(workload, twin.config, twin.latency, twin.host, run), judged, [note]


def _missing(layers: Sequence[str]) -> list[str]:
    """What the recording does not hold, and where its share went."""
    notes = []
    if HOST_AND_SCHEDULE in layers:
        notes.append("sched_ns is not recorded and the engine schedules ahead: host and schedule share a bar")
    if layers[-1] == _ENGINE:
        notes.append("the recording has no steps: what the engine does cannot be told apart")
    if layers[-1] == _ALL:
        notes.append("queued_ns is not recorded, or there is no price for a step: what the engine does is one bar")
    if "cache" not in layers:
        notes.append("cache hits are as recorded, or not recorded")
    return notes
