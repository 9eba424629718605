"""How much of each end-to-end error each simulated layer causes: a waterfall that adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.stats import FloatArray, Interval
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS, NS_PER_S
from kvtwin.validate.attribution import clocks, evidence
from kvtwin.validate.attribution.bars import bar_interval, summary
from kvtwin.validate.attribution.evidence import DECIDED, holds_zero, is_doubtful
from kvtwin.validate.attribution.hybrids import (
    HOST_AND_SCHEDULE,
    Stage,
    Twin,
    knows_calls,
    recorded_hits,
    replay,
    stages,
)
from kvtwin.validate.beginning import beginning
from kvtwin.validate.e2e import Clock, request_metrics
from kvtwin.validate.gates import TIMES
from kvtwin.validate.result import Attribution, Check, Part, ScheduleFinding
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.throughput import lag_interval
from kvtwin.validate.units import unit_note

REMAINDER: Final = "remainder"
UNITS: Final = "units"  # blamed where all times are off by the factor between two units, and those of the steps are not
_ENGINE: Final = "step times, host, schedule"  # where the recording has no steps
_ALL: Final = "arrival, step times, host, schedule"  # ... and does not say when requests reached the engine
MAX_STEPS: Final = 40_000  # recorded layers run in the plain loop, some 50 us a step
_NEGLIGIBLE: Final = 0.001
_LEFT_OVER: Final = 0.01  # the host has no measure of its own: a smaller bar may be what the others leave over
_TIMED: Final = ("arrival", "step times")  # layers whose own evidence is a measurement of theirs alone
_STATISTICS: Final = ("mean", "p50", "p90")


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
    truth, predicted = _Side.of(measured, clock), _Side.of(twin.run, clock)
    contradiction = clocks.steps_and_requests(measured)
    steps = evidence.step_times(checks, contradiction or "")
    unit = next(filter(None, (unit_note(truth.times[key], predicted.times[key]) for key in ("latency", "ttft"))), None)
    words = [*notes, *cut, *filter(None, (unit, contradiction)), *_step_units(checks)]
    if unit is not None and not any(row.blamed for row in steps):
        # Nothing can be replayed at times of another unit, and no layer is at fault.
        chain = _Chain((predicted, truth), [UNITS], judged, {UNITS}, "; ".join(words))
        return [*chain.attributions(name, checks), *steps]
    has_calls = knows_calls(measured, twin.config)
    dispatched_ns = clocks.dispatches(measured, has_calls=has_calls)
    shift_ns, predicted_shift_ns = _shifts(measured, twin.run, dispatched_ns)
    aligned = clocks.with_queue_moved(measured, shift_ns, dispatched_ns)
    twin = replace(twin, workload=clocks.with_queue_moved(twin.workload, shift_ns, dispatched_ns))
    replayed, refused = _replay(aligned, twin) if has_calls else (None, [])
    own = [
        *evidence.output_lengths(measured, twin, name),
        *evidence.arrival(aligned, twin, shift_ns or predicted_shift_ns, checks, name),
        *steps,
        *_decisions(aligned, twin, replayed, None if shift_ns else schedule, name),
    ]
    suspected = {row.blamed for row in own if row.blamed is not None} | (set() if contradiction else _host(own))
    found = list(stages(aligned, twin, replayed))
    layers = _layers(found, measured)
    words += [
        *refused,
        *_missing(layers),
        *_clock_note(shift_ns, "recorded"),
        *_clock_note(predicted_shift_ns, "predicted"),
    ]
    sides = (predicted, *(_side(stage, measured, twin, clock) for stage in found[1:]), truth)
    chain = _Chain(sides, layers, judged, suspected, "; ".join(words))
    return _with_hidden([*_without_trifles(chain.attributions(name, checks)), *own], suspected)


def _replay(measured: Run, twin: Twin) -> tuple[Run | None, list[str]]:
    """The simulated scheduler under the recording's clock; None, and why, where the log cannot be replayed."""
    try:
        return replay(measured, twin), []
    except InputError as error:
        return None, [f"decisions are not judged: {error.problem}"]


def _decisions(
    measured: Run, twin: Twin, replayed: Run | None, schedule: ScheduleFinding | None, name: str
) -> list[Attribution]:
    """Decisions and hits by their own measure.

    A replay at guessed times decides otherwise for that alone, which is evidence against nobody.
    """
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


def _shifts(measured: Run, simulated: Run, dispatched_ns: FloatArray) -> tuple[int, int]:
    """By how much the queue's clock of either run is off that of its dispatches (`clocks.queue_shift`)."""
    recorded = clocks.waits(measured, dispatched_ns)
    predicted = clocks.waits(simulated, clocks.dispatches(simulated, has_calls=False))
    turn_ns = clocks.turn_ns(measured)
    return clocks.queue_shift(recorded, predicted, turn_ns), clocks.queue_shift(predicted, recorded, turn_ns)


def _clock_note(shift_ns: int, whose: str) -> list[str]:
    if not shift_ns:
        return []
    side = "before" if shift_ns > 0 else "after"
    return [
        f"{whose} queued_ns lies {abs(shift_ns) / NS_PER_MS:.3f} ms {side} where the dispatches of all requests put it"
    ]


def _step_units(checks: Sequence[Check]) -> list[str]:
    """Requests queue on wrong step times, so that their own times are off by no unit's factor."""
    words = {word for check in checks if check.level == "step" for word in check.note.split("; ") if "units" in word}
    return [f"step times: {word}" for word in sorted(words)]


@dataclass(frozen=True)
class _Side:
    """One stage's times by name in TIMES, in ms, and when each request starts and finishes, in ns; NaN where unknown."""

    times: Mapping[str, FloatArray]
    start_ns: FloatArray
    finish_ns: FloatArray
    tokens: FloatArray

    @classmethod
    def of(cls, run: Run, clock: Clock) -> _Side:
        """A run by itself."""
        metrics = request_metrics(run, clock)
        times = {time: metrics[f"{time}_ms"] for time in TIMES}
        start_ns, tokens = (_floats(run.requests, key) for key in (clock, "output_tokens"))
        return cls(times, start_ns, start_ns + NS_PER_MS * times["latency"], tokens)

    def throughput(self, rows: npt.NDArray[np.bool_]) -> float:
        """Output tokens per second from the first start to the last finish."""
        span = self.finish_ns[rows].max() - self.start_ns[rows].min()
        return float(self.tokens[rows].sum() * NS_PER_S / span) if span > 0 else float("nan")


@dataclass(frozen=True)
class _Chain:
    """The stages from the twin to the measurement, and who is suspected.

    Attributes:
        sides: of the twin, of each stage, and the measurement.
        layers: the bars between them.
        judged: requests that count.
        suspected: layers with evidence against them.
        note: what a reader must know.
    """

    sides: Sequence[_Side]
    layers: Sequence[str]
    judged: npt.NDArray[np.bool_]
    suspected: set[str]
    note: str

    def attributions(self, name: str, checks: Sequence[Check]) -> list[Attribution]:
        """A waterfall per time and statistic, and that of the throughput."""
        result = []
        for time in TIMES:
            chain = [side.times[time] for side in self.sides]
            known = self.judged & np.isfinite(chain).all(axis=0)
            columns = [column[known] for column in chain]
            for statistic in _STATISTICS if known.any() else ():
                numbers = [summary(column, statistic) for column in columns]
                bars = pairwise(columns)
                sure = [bar_interval(before, after, columns[-1], statistic) for before, after in bars]
                result.append(self._waterfall(name, checks, f"{time}_{statistic}", "ms", numbers, sure))
        known = self.judged & np.isfinite([side.finish_ns for side in self.sides]).all(axis=0)
        if known.any():
            numbers = [side.throughput(known) for side in self.sides]
            if np.isfinite(numbers).all():
                result.append(
                    self._waterfall(name, checks, "throughput", "tokens/s", numbers, self._lags(known, numbers))
                )
        return result

    def _lags(self, known: npt.NDArray[np.bool_], numbers: Sequence[float]) -> list[Interval | None]:
        """The intervals of the throughput's bars: how far one stage lags behind the next."""
        result: list[Interval | None] = []
        for (before, after), number in zip(pairwise(self.sides), numbers[1:], strict=True):
            order = np.argsort(after.start_ns[known], kind="stable")
            columns = [values[known][order] for values in (after.start_ns, after.finish_ns, before.finish_ns)]
            found = lag_interval(*columns) if np.array_equal(before.tokens, after.tokens) else None
            result.append(None if found is None else (found[0] * number / numbers[-1], found[1] * number / numbers[-1]))
        return result

    def _waterfall(
        self,
        name: str,
        checks: Sequence[Check],
        metric: str,
        unit: str,
        numbers: Sequence[float],
        sure: Sequence[Interval | None],
    ) -> Attribution:
        """Numbers: of the twin, of each stage, and the measurement."""
        measured, simulated = numbers[-1], numbers[0]
        parts = tuple(
            Part(layer, (before - after) / measured, interval)
            for layer, before, after, interval in zip(self.layers, numbers[:-1], numbers[1:], sure, strict=True)
        )
        check = next((check for check in checks if check.metric == metric), None)
        error = simulated / measured - 1
        doubtful = abs(error) < _NEGLIGIBLE or (check is not None and is_doubtful(check))
        blamed = _blamed(parts, error, self.suspected, doubtful=doubtful)
        return Attribution(name, metric, unit, measured, simulated, parts, blamed, self.note)


def _blamed(parts: Sequence[Part], error: float, suspected: set[str], *, doubtful: bool) -> str | None:
    """Of the layers with evidence against them the one that moves the error most.

    A bar whose interval holds zero is nobody's. Other decisions or hits than recorded are faults whatever they do end
    to end. The times of a layer are blamed for an error that is there, and only if they make at least half of it. Wrong
    units are no layer's: they are in all bars.
    """
    if UNITS in suspected:
        return UNITS
    accountable = [
        part
        for part in parts
        if part.layer in suspected
        and (part.layer != "host" or abs(part.change) >= _LEFT_OVER)
        and not (part.interval is not None and holds_zero(part.interval))
        and (part.layer in DECIDED or (not doubtful and 2 * part.change * np.sign(error) >= abs(error)))
    ]
    return max(accountable, key=lambda part: abs(part.change)).layer if accountable else None


def _without_trifles(found: Sequence[Attribution]) -> list[Attribution]:
    """Nobody is blamed for a bar that cannot be seen: the layer's own measure names it."""
    return [replace(one, blamed=None) if _is_trifle(one) else one for one in found]


def _is_trifle(found: Attribution) -> bool:
    return any(part.layer == found.blamed and abs(part.change) < _NEGLIGIBLE for part in found.parts)


def _with_hidden(found: Sequence[Attribution], suspected: set[str]) -> list[Attribution]:
    """Where nobody is blamed end to end, says who differs nonetheless: errors cancel, or the clock leaves a layer out."""
    hidden = [layer for layer in _TIMED if layer in suspected]
    end_to_end = [one for one in found if len(one.parts) > 1]
    if not hidden or any(one.blamed for one in end_to_end):
        return list(found)
    note = f"not as recorded, though no end-to-end error seen here is theirs: {', '.join(hidden)}"
    return [replace(one, note="; ".join(filter(None, (one.note, note)))) for one in found]


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
    note = f"of the first {MAX_STEPS} steps: {int(judged.sum())} requests"
    return first, Twin(workload, twin.config, twin.latency, twin.host, run), judged, [note]


def _side(stage: Stage, measured: Run, twin: Twin, clock: Clock) -> _Side:
    """Times of the requests at one stage, counted from where the measurement counts."""
    start, tokens = (_floats(measured.requests, key) for key in (clock, "output_tokens"))
    first, finish = (_floats(stage.requests, key) for key in ("first_token_ns", "finish_ns"))
    tpot = np.full(len(tokens), np.nan)
    np.divide((finish - first) / NS_PER_MS, tokens - 1, out=tpot, where=tokens > 1)
    output = twin.host.output_ns if clock == "arrival_ns" else 0
    times = {
        "ttft": (first + output - start) / NS_PER_MS,
        "tpot": tpot,
        "latency": (finish + output - start) / NS_PER_MS,
    }
    return _Side(times, start, finish + output, tokens)


def _floats(table: pa.Table, name: str) -> FloatArray:
    values: FloatArray = table.column(name).cast(pa.float64(), safe=False).to_numpy()
    return values


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
