"""The step level: what a profile says each recorded batch takes, beside what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate import stats
from kvtwin.calibrate.accuracy import step_statistics
from kvtwin.calibrate.noise import MIN_MATCHED, alike_steps
from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.stats import BatchStats, durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import to_ms
from kvtwin.validate.gates import NO_GATES, Gates, judge
from kvtwin.validate.result import PREDICTIONS, Check
from kvtwin.validate.units import unit_note

NAN: Final = float("nan")
_TOO_FEW: Final = f"fewer than {MIN_MATCHED} steps of this regime: not judged"


def build_predictions(
    steps: pa.Table,
    predicted_ns: npt.NDArray[np.int64],
    extrapolated: npt.NDArray[np.bool_] | None = None,
    batches: BatchStats | None = None,
) -> pa.Table:
    """The table of schema PREDICTIONS of a recorded run.

    Args:
        steps: its `steps` table; no batch is empty.
        predicted_ns: what the model says, one per row.
        extrapolated: whether the batch lies outside the profile's domain; None where that is unknown.
        batches: of the steps, where they are at hand.
    """
    batches = BatchStats.of_steps(steps) if batches is None else batches
    columns = {
        "step": steps.column("step"),
        "start_ns": steps.column("start_ns"),
        "measured_ns": durations_ns(steps),
        "predicted_ns": predicted_ns,
        "regime": batches.regime,
        "num_reqs": batches.num_reqs,
        "num_tokens": batches.num_tokens,
        "context_tokens": batches.decode_context + batches.prefill_context,
        "extrapolated": pa.nulls(steps.num_rows, pa.bool_()) if extrapolated is None else extrapolated,
    }
    return pa.table(columns, schema=PREDICTIONS)


def predictions_of_run(measured: Run, predicted: Run) -> tuple[pa.Table, str]:
    """The same, where the prediction is another run: each step beside the alike step of the other run.

    Returns:
        The table of schema PREDICTIONS, of the steps that have an alike one, and what a reader must know about it.

    Raises:
        InputError: a run has no steps, or no two steps are alike.
    """
    rows = alike_steps(measured, predicted)
    found = rows >= 0
    if not found.any():
        problem = f"no step has a batch like one of {predicted.path or 'the predicted run'}: other engine settings?"
        raise InputError(problem, path=measured.path, column="steps")
    steps = measured.steps.filter(pa.array(found))
    note = f"{found.mean():.1%} of the steps have one with an alike batch in the other run"
    return build_predictions(steps, durations_ns(predicted.steps)[rows[found]]), note


def compare_steps(
    predictions: pa.Table,
    *,
    name: str,
    floor: Mapping[str, float] | None = None,
    gates: Gates = NO_GATES,
) -> list[Check]:
    """Judge the predicted step times of one recorded run.

    Args:
        predictions: table of schema PREDICTIONS, in any order.
        name: the recorded run's name.
        floor: noise floor by metric (`noise.step_floor(...).metrics`); None without repeats.
        gates: see `gates.parse_gates`.

    Returns:
        Judged checks; none if no step has a positive duration. A regime that does not occur has no check.
    """
    table = predictions.sort_by([("start_ns", "ascending"), ("step", "ascending")])
    table = table.filter(pa.array(table.column("measured_ns").to_numpy() > 0))
    n = table.num_rows
    if n == 0:
        return []
    measured, predicted = (table.column(key).to_numpy().astype(np.float64) for key in ("measured_ns", "predicted_ns"))
    regime = np.asarray(table.column("regime"))
    statistics = step_statistics(measured, predicted, regime)
    notes = [*_warnings(measured, predicted), *_notes(table, dropped=predictions.num_rows - n)]
    checks = []
    for metric, statistic in statistics.items():
        error, count = statistic.value, statistic.num_rows
        check = Check(
            name,
            "step",
            metric,
            *_values(metric, measured, predicted, error),
            error,
            stats.interval(statistic),
            count,
            None if floor is None else floor.get(metric),
            note="; ".join([stats.describe(statistic, "steps"), *notes]),
        )
        rare = count < min(MIN_MATCHED, n)  # a regime that hardly occurs is an anecdote
        checks.append(replace(check, note=f"{check.note}; {_TOO_FEW}") if rare else judge(check, gates))
    return checks


def _warnings(measured: FloatArray, predicted: FloatArray) -> list[str]:
    warning = unit_note(measured, predicted)
    return [] if warning is None else [warning]


def _values(metric: str, measured: FloatArray, predicted: FloatArray, error: float) -> tuple[str, float, float]:
    """Unit, measured and simulated value: whatever `error` is the relative error of; NaN for a size."""
    if metric == "step_bias":
        return "ms", to_ms(measured.sum()), to_ms(predicted.sum())
    if metric == "step_mean_error":
        return "x measured", 1.0, 1 + error  # the mean ratio of predicted to measured
    return "%", NAN, NAN


def _notes(table: pa.Table, dropped: int) -> list[str]:
    parts = []
    known = table.column("extrapolated").drop_null()
    if len(known):
        outside = np.count_nonzero(known.to_numpy(zero_copy_only=False)) / table.num_rows
        parts.append(f"{outside:.1%} of the steps lie outside the profile's domain")
    if dropped:
        parts.append(f"{dropped} steps that took no time left out")
    return parts
