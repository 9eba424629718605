"""How much of each end-to-end error each simulated layer causes: a waterfall that adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.stats import BatchStats, durations_ns
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.attribution.evidence import DECIDED, is_doubtful, suspects
from kvtwin.validate.attribution.hybrids import HOST_AND_SCHEDULE, Stage, Twin, knows_calls, replay, stages
from kvtwin.validate.beginning import beginning
from kvtwin.validate.e2e import QUANTILES, Clock, request_metrics
from kvtwin.validate.gates import TIMES
from kvtwin.validate.result import Attribution, Check, Part, ScheduleFinding
from kvtwin.validate.units import unit_note

REMAINDER: Final = "remainder"
UNITS: Final = "units"  # blamed where all times are off by the factor between two units, and those of the steps are not
_ENGINE: Final = "step times, host, schedule"  # where the recording has no steps
_ALL: Final = "arrival, step times, host, schedule"  # ... and does not say when requests reached the engine
MAX_STEPS: Final = 40_000  # recorded layers run in the plain loop, some 50 us a step
_NEGLIGIBLE: Final = 0.001
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
        checks, schedule: of this run: the evidence without which no layer is blamed (`evidence.suspects`).

    Returns:
        mean, p50, p90 of TTFT, TPOT and latency, over the requests that all stages served.

    Raises:
        InputError: see `e2e.request_metrics`.
    """
    measured, twin, judged, notes = _beginning(measured, twin)
    knows = measured.has("steps") and knows_calls(measured, twin.config)
    # A replay at guessed times decides otherwise for that alone, which is evidence against nobody.
    replayed, decisions = (replay(measured, twin), schedule) if knows else (None, None)
    found = list(stages(measured, twin, replayed))
    suspected = suspects(measured, twin, replayed, decisions, checks)
    truth = request_metrics(measured, clock)
    values = [_metrics(stage, measured, twin, clock) for stage in found]
    layers = [stage.layer for stage in found[1:]]
    layers.append(
        REMAINDER if "arrival" in layers and measured.has("steps") else _ENGINE if "arrival" in layers else _ALL
    )
    notes += _missing(layers)
    units = next(filter(None, (unit_note(truth[key], values[0][key]) for key in ("latency_ms", "ttft_ms"))), None)
    units_of_steps = _units_of_steps(measured, twin)
    notes += [note for note in (units, units_of_steps) if note is not None]
    if units is not None:
        suspected = suspected & {"step times"} or {UNITS}
    result = []
    for time in TIMES:
        key = f"{time}_ms"
        chain = [*(value[key] for value in values), truth[key]]
        known = judged & np.isfinite(chain).all(axis=0)
        for statistic in _STATISTICS if known.any() else ():
            numbers = [_summary(column[known], statistic) for column in chain]
            result.append(_waterfall(name, f"{time}_{statistic}", layers, numbers, suspected, checks, "; ".join(notes)))
    return _with_hidden(_without_trifles(result), suspected)


def _units_of_steps(measured: Run, twin: Twin) -> str | None:
    """Requests queue on wrong step times, so that their own times are off by no unit's factor."""
    if not measured.has("steps"):
        return None
    predicted = twin.latency.step_ns(BatchStats.of_steps(measured.steps), 0)
    note = unit_note(durations_ns(measured.steps).astype(np.float64), predicted.astype(np.float64))
    return None if note is None else f"step times: {note}"


def _waterfall(
    run: str,
    metric: str,
    layers: Sequence[str],
    numbers: Sequence[float],
    suspected: set[str],
    checks: Sequence[Check],
    note: str,
) -> Attribution:
    """Numbers: of the twin, of each stage, and the measurement."""
    measured, simulated = numbers[-1], numbers[0]
    parts = tuple(
        Part(layer, (before - after) / measured)
        for layer, before, after in zip(layers, numbers[:-1], numbers[1:], strict=True)
    )
    check = next((check for check in checks if check.metric == metric), None)
    error = simulated / measured - 1
    doubtful = abs(error) < _NEGLIGIBLE or (check is not None and is_doubtful(check))
    blamed = _blamed(parts, error, suspected, doubtful=doubtful)
    return Attribution(run, metric, "ms", measured, simulated, parts, blamed, note)


def _blamed(parts: Sequence[Part], error: float, suspected: set[str], *, doubtful: bool) -> str | None:
    """Of the layers with evidence against them the one that moves the error most.

    Other decisions or hits than recorded are faults whatever they do end to end. The times of a layer are blamed for an
    error that is there, and only if they make at least half of it. Wrong units are no layer's: they are in all bars.
    """
    if UNITS in suspected:
        return UNITS
    accountable = [
        part
        for part in parts
        if part.layer in suspected
        and (part.layer in DECIDED or (not doubtful and 2 * part.change * np.sign(error) >= abs(error)))
    ]
    return max(accountable, key=lambda part: abs(part.change)).layer if accountable else None


def _without_trifles(found: Sequence[Attribution]) -> list[Attribution]:
    """Nobody is blamed for a bar that cannot be seen, unless its layer has none that can."""
    bars = [abs(next((part.change for part in one.parts if part.layer == one.blamed), 1.0)) for one in found]
    seen = {one.blamed for one, bar in zip(found, bars, strict=True) if bar >= _NEGLIGIBLE}
    return [
        replace(one, blamed=None) if bar < _NEGLIGIBLE and one.blamed in seen else one
        for one, bar in zip(found, bars, strict=True)
    ]


def _with_hidden(found: Sequence[Attribution], suspected: set[str]) -> list[Attribution]:
    """Where nobody is blamed, says who differs nonetheless: errors cancel, or the clock leaves a layer out."""
    hidden = [layer for layer in _TIMED if layer in suspected]
    if not hidden or any(one.blamed for one in found):
        return list(found)
    note = f"not as recorded, though no error seen here is theirs: {', '.join(hidden)}"
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


def _metrics(stage: Stage, measured: Run, twin: Twin, clock: Clock) -> Mapping[str, FloatArray]:
    """Times of the requests at one stage, counted from where the measurement counts."""
    if not stage.layer:
        return request_metrics(Run(twin.run.info, {"requests": stage.requests}), clock)
    start = measured.requests.column(clock).to_numpy().astype(np.float64)
    first, finish = (
        stage.requests.column(key).cast("float64", safe=False).to_numpy() for key in ("first_token_ns", "finish_ns")
    )
    gaps = measured.requests.column("output_tokens").to_numpy() - 1
    tpot = np.full(len(gaps), np.nan)
    np.divide((finish - first) / NS_PER_MS, gaps, out=tpot, where=gaps > 0)
    output = twin.host.output_ns if clock == "arrival_ns" else 0
    return {
        "ttft_ms": (first + output - start) / NS_PER_MS,
        "tpot_ms": tpot,
        "latency_ms": (finish + output - start) / NS_PER_MS,
    }


def _missing(layers: Sequence[str]) -> list[str]:
    """What the recording does not hold, and where its share went."""
    notes = []
    if HOST_AND_SCHEDULE in layers:
        notes.append("sched_ns is not recorded and the engine schedules ahead: host and schedule share a bar")
    if layers[-1] == _ENGINE:
        notes.append("the recording has no steps: what the engine does cannot be told apart")
    if layers[-1] == _ALL:
        notes.append("queued_ns is not recorded: nothing can be told apart")
    if "cache" not in layers:
        notes.append("cache hits are as recorded, or not recorded")
    return notes


def _summary(values: FloatArray, statistic: str) -> float:
    return float(values.mean() if statistic == "mean" else np.quantile(values, QUANTILES[statistic]))
