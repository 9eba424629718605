"""The noise floor: how far repeated recordings of one workload lie from one another.

**Which definition.** For K recordings with values x_1 .. x_K of a metric, the floor is the root mean square of
x_j / x_i - 1 over all ordered pairs i != j: the error that one recording makes as a prediction of another. With
s the standard deviation between recordings it estimates sqrt(2) s / mean, without bias in its square for any K >= 2.

What it says, measured on normal recordings with K = 2, 3, 4 (tests/validate/test_noise.py):

- a twin that knows the true mean lies within it of one recording in 65, 76, 79 % of cases (s known: 84 %), because it
  sees the deviation of one recording only;
- a twin that is itself one more recording, which is what calibrating on another day's recording makes, lies within it
  in 50, 58, 61 % of cases (s known: 68 %).

So an error inside the floor cannot be told from a re-recording; an error outside it is no proof of a fault, least of
all with two repeats. The narrower choice s / mean would call 40 to 50 % of the perfect twins distinguishable.

A per-request or per-step MAPE is a size already, so its floor is the mean over the ordered pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate import stats
from kvtwin.calibrate.accuracy import SIGNED, step_statistics
from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.stats import REGIMES, BatchStats, IntArray, durations_ns
from kvtwin.traces.run import Run

# Two batches are alike if their contexts differ by no more than this share, or by this many tokens. Without a bound
# the nearest batch can be far away, and the floor would forgive a twin for errors that are not noise.
MAX_CONTEXT_GAP: Final = 0.05
MIN_CONTEXT_GAP: Final = 32

# A regime's floor needs this many matched steps in a pair of recordings: fewer are an anecdote.
MIN_MATCHED: Final = 10


def rms_floor(values: Sequence[float]) -> float | None:
    """RMS over ordered pairs of the relative difference of repeated values; None for fewer than two of them.

    >>> round(rms_floor([100.0, 110.0]), 4)
    0.0956
    """
    errors = _finite(stats.relative_error(one, other) for one, other in permutations(values, 2))
    return _rms(errors) if errors else None


def paired_floor(columns: Sequence[FloatArray]) -> float | None:
    """Mean over ordered pairs of the MAPE between repeated columns, row by row.

    Args:
        columns: one per recording, rows in the same order; rows that are NaN or not positive in either of two
            columns are left out of that pair.
    """
    errors = _finite(_paired_mape(one, other) for one, other in permutations(columns, 2))
    return float(np.mean(errors)) if errors else None


@dataclass(frozen=True)
class StepFloor:
    """What steps with alike batches show between recordings.

    Attributes:
        metrics: noise floor by step metric ("step_mape", "step_mape_decode", "step_bias", ...); see
            `accuracy.step_statistics`.
        matched: share of all steps that found a step with an alike batch in another recording.
        num_pairs: pairs of steps compared, over all ordered pairs of recordings.
        drift: largest ratio between two recordings of the median time of alike batches: above 1 where the machine
            itself was faster in one of them.
    """

    metrics: Mapping[str, float]
    matched: float
    num_pairs: int
    drift: float


def step_floor(runs: Sequence[Run]) -> StepFloor | None:
    """The noise floor of step times, from steps of different recordings whose batches are alike.

    Each step is matched with the step of the other recording that has as many decode members, as many prefill members,
    as many prefill tokens, and the nearest total context, within 5 % or 32 tokens. Steps without a match are left out.
    Both steps are noisy, so a model that knows the mean of every batch can lie below this floor.

    Args:
        runs: recordings of one workload, each with a `steps` table.

    Returns:
        None for fewer than two recordings, or if no batches are alike.

    Raises:
        InputError: a run has no steps table.
    """
    sides = [_Side.of(run) for run in runs]
    pairs = [_match(one, other) for one, other in permutations(sides, 2)]
    found = [pair for pair in pairs if len(pair.measured)]
    if not found:
        return None
    values = [pair.values() for pair in found]
    metrics = {}
    for metric in dict.fromkeys(name for value in values for name in value):
        errors = [value[metric] for value in values if metric in value]
        metrics[metric] = _rms(errors) if metric in SIGNED else float(np.mean(errors))
    num_pairs = sum(len(pair.measured) for pair in found)
    possible = sum(pair.possible for pair in pairs)
    drift = max(float(np.median(pair.predicted / pair.measured)) for pair in found)
    return StepFloor(metrics, num_pairs / possible, num_pairs, drift)


def alike_steps(run: Run, other: Run) -> IntArray:
    """For each step of one run the row of the alike step of another (see `step_floor`), -1 where there is none.

    Of several that are equally near, the one at the same place wins: two runs of one schedule are compared in step.

    Raises:
        InputError: a run has no steps table.
    """
    one, two = _Side.of(run), _Side.of(other)
    rows, other_rows = (np.flatnonzero(durations_ns(side.steps) > 0) for side in (run, other))
    nearest, alike = _nearest(one, two)
    both = min(len(rows), len(other_rows))
    same = (one.shape[:both] == two.shape[:both]).all(axis=1) & (one.context[:both] == two.context[:both])
    nearest[:both] = np.where(same, np.arange(both), nearest[:both])
    found = np.full(run.steps.num_rows, -1, np.int64)
    found[rows[alike]] = other_rows[nearest[alike]]
    return found


@dataclass(frozen=True)
class RunFloor:
    """What one recording's steps allow a model to reach, in MAPE, from the widest floor to the narrowest.

    A model's error on this recording is judged by its ratio to these. None where no alike steps exist.

    Attributes:
        repeat: each step predicted by the alike step of another recording, the mean over the others: what recording
            the workload again gives. The project's noise floor (`step_floor`) of this one recording.
        known: each step predicted by the mean of all alike steps in all other recordings: what a model that knows
            the mean of every single batch from other days reaches. The strict floor for a model fitted on other days.
        within: each step predicted by the alike step of the same recording: jitter, without the machine's drift
            between recordings. No model fitted on other days can know this day's speed.
        matched: share of the steps that `known` rests on.
    """

    repeat: float | None
    known: float | None
    within: float | None
    matched: float


def run_floor(run: Run, others: Sequence[Run]) -> RunFloor:
    """The noise floors of one recording.

    Args:
        run: the recording that a model is judged on.
        others: further recordings of the same workload; none leaves `within` only.

    Raises:
        InputError: a run has no steps table.
    """
    one, sides = _Side.of(run), [_Side.of(other) for other in others]
    repeats = _finite(_mape_or_nan(_match(one, side)) for side in sides)
    known, matched = _mean_of_alike(one, sides)
    return RunFloor(
        repeat=float(np.mean(repeats)) if repeats else None,
        known=known,
        within=_mape_within(one),
        matched=matched,
    )


def _mape_or_nan(pair: _Matched) -> float:
    return stats.mape(pair.measured, pair.predicted) if len(pair.measured) else float("nan")


def _mean_of_alike(one: _Side, sides: Sequence[_Side]) -> tuple[float | None, float]:
    """MAPE of the mean of all alike steps of the other sides, and the share of steps that have any."""
    if not sides or not len(one.context):
        return None, 0.0
    pool = _Side(*(np.concatenate([getattr(side, name) for side in sides]) for name in _Side.__dataclass_fields__))
    keys, order, asked, width = _keys(one, pool)
    gap = np.maximum((MAX_CONTEXT_GAP * one.context).astype(np.int64), MIN_CONTEXT_GAP)
    low = np.searchsorted(keys, asked - np.minimum(gap, one.context), side="left")
    high = np.searchsorted(keys, asked + np.minimum(gap, width - 1 - one.context), side="right")
    total = np.concatenate([[0.0], np.cumsum(pool.duration[order])])
    alike = high > low
    if not alike.any():
        return None, 0.0
    mean = (total[high] - total[low])[alike] / (high - low)[alike]
    return stats.mape(one.duration[alike], mean), float(alike.mean())


def _mape_within(one: _Side) -> float | None:
    """MAPE of the nearest alike step of the same side."""
    if len(one.context) < 2:
        return None
    keys, order, _, width = _keys(one, one)
    shape, context, duration = keys // width, keys % width, one.duration[order]
    gap = np.where(np.diff(shape) == 0, np.diff(context), width)
    nearest = np.minimum(np.append(gap, width), np.insert(gap, 0, width))
    other = np.arange(len(keys)) + np.where(np.append(gap, width) <= np.insert(gap, 0, width), 1, -1)
    alike = nearest <= np.maximum(MAX_CONTEXT_GAP * context, MIN_CONTEXT_GAP)
    alike &= nearest < width
    return stats.mape(duration[alike], duration[other[alike]]) if alike.any() else None


@dataclass(frozen=True)
class _Side:
    """The steps of one recording that took time."""

    shape: npt.NDArray[np.int64]  # (n, 3): decode members, prefill members, prefill tokens
    context: npt.NDArray[np.int64]
    duration: FloatArray
    regime: npt.NDArray[np.str_]

    @classmethod
    def of(cls, run: Run) -> _Side:
        batches, duration = BatchStats.of_steps(run.steps), durations_ns(run.steps)
        batches, duration = batches[duration > 0], duration[duration > 0]
        shape = np.column_stack([batches.num_decode, batches.num_prefill, batches.prefill_tokens])
        context = batches.decode_context + batches.prefill_context
        return cls(shape, context, duration.astype(np.float64), batches.regime)


@dataclass(frozen=True)
class _Matched:
    """Steps of one recording ("measured") and the alike steps of another ("predicted")."""

    measured: FloatArray
    predicted: FloatArray
    regime: npt.NDArray[np.str_]
    possible: int  # steps that could have found a match

    def values(self) -> dict[str, float]:
        """Every step metric of this pair, but those of a regime with too few steps."""
        statistics = step_statistics(self.measured, self.predicted, self.regime)
        rare = {f"step_mape_{name}" for name in REGIMES if np.count_nonzero(self.regime == name) < MIN_MATCHED}
        return {name: statistic.value for name, statistic in statistics.items() if name not in rare}


def _match(one: _Side, other: _Side) -> _Matched:
    """For each step of `one` the alike step of `other`."""
    nearest, alike = _nearest(one, other)
    return _Matched(one.duration[alike], other.duration[nearest[alike]], one.regime[alike], len(alike))


def _nearest(one: _Side, other: _Side) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row of `other` with the same shape and the nearest context, per row of `one`, and whether it is alike."""
    if not len(one.context) or not len(other.context):
        return np.zeros(len(one.context), np.int64), np.zeros(len(one.context), np.bool_)
    keys, order, asked, width = _keys(one, other)
    right = np.searchsorted(keys, asked)
    best, gap = np.zeros(len(right), np.int64), np.full(len(right), np.iinfo(np.int64).max)
    for place in (right - 1, right):
        at = np.clip(place, 0, len(order) - 1)
        distance = np.abs(keys[at] % width - one.context)
        closer = (keys[at] // width == asked // width) & (distance < gap)
        best, gap = np.where(closer, order[at], best), np.where(closer, distance, gap)
    return best, gap <= np.maximum(MAX_CONTEXT_GAP * one.context, MIN_CONTEXT_GAP)


def _keys(one: _Side, other: _Side) -> tuple[IntArray, IntArray, IntArray, int]:
    """One number per step for shape and context: shape * width + context; a context is smaller than the width.

    Returns:
        the sorted keys of `other`, the rows they belong to, the keys of `one`, and the width.
    """
    _, shape = np.unique(np.concatenate([one.shape, other.shape]), axis=0, return_inverse=True)
    one_shape, other_shape = np.split(shape.ravel().astype(np.int64), [len(one.context)])
    width = int(max(one.context.max(), other.context.max())) + 1
    keys = other_shape * width + other.context
    order = np.argsort(keys, kind="stable")
    return keys[order], order, one_shape * width + one.context, width


def _finite(errors: Iterable[float]) -> list[float]:
    return [error for error in errors if np.isfinite(error)]


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _paired_mape(measured: FloatArray, other: FloatArray) -> float:
    both = (measured > 0) & np.isfinite(other)
    return stats.mape(measured[both], other[both]) if both.any() else float("nan")
