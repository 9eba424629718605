"""Which candidate a profile takes, and what its held-out errors were.

The rule: on each load axis the mean absolute error of the left-out inner rows counts, every axis alike. The best
candidate is the one with the lowest mean; a simpler one is *equal* to it where it is behind by no more than one
standard error of the paired difference over left-out values and no more than a twentieth of the best one's error, or
by less than 0.05 percentage points. Of equal candidates the simplest is taken; the naive fits never are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.tables.holdout import HeldOut
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.traces.readers.optable import OpSamples

NAIVE: Final = ("ols", "nearest", "linear")
_ONLY_NAIVE: Final = ("ols", "nearest")
_EQUAL_SHARE: Final = 0.05
_NOTHING: Final = 5e-4
_DEFAULT: Final = "trend"  # where nothing could be held out inside


@dataclass(frozen=True)
class Choice:
    """The candidate taken, and every candidate's mean held-out error (a fraction; the mean over axes)."""

    name: str
    scores: Mapping[str, float]


def choose(samples: OpSamples, held: HeldOut) -> Choice:
    """Apply the rule of this module."""
    axes = [axis for axis in samples.load if held.part(axis, True).any()]
    if not axes:
        return Choice(_DEFAULT, {})
    # Whole steps are measured along a cross (batches of one length, single prompts of every length): the table alone knows
    # nothing between its arms, which no left-out row shows.
    never = NAIVE if samples.work.endswith("_step") else _ONLY_NAIVE
    candidates = [name for name in held.predicted if name not in never]  # simplest first
    errors = {name: np.abs(held.predicted[name] / samples.time_us[held.row] - 1) for name in candidates}
    scores = {
        name: float(np.mean([error[held.part(axis, True)].mean() for axis in axes])) for name, error in errors.items()
    }
    best = min(candidates, key=lambda name: scores[name])
    for name in candidates:
        behind = scores[name] - scores[best]
        if behind <= _NOTHING or (
            behind <= _EQUAL_SHARE * scores[best] and behind <= _standard_error(errors[name] - errors[best], held, axes)
        ):
            return Choice(name, scores)
    raise AssertionError("the best candidate is equal to itself")


def _standard_error(difference: FloatArray, held: HeldOut, axes: Sequence[str]) -> float:
    """Of the mean over axes of the mean paired difference, from the spread between left-out values."""
    variance = 0.0
    for axis in axes:
        part = held.part(axis, True)
        _, index = np.unique(held.group[part], return_inverse=True)
        means = np.bincount(index.ravel(), weights=difference[part]) / np.bincount(index.ravel())
        if len(means) > 1:
            variance += float(means.var(ddof=1)) / len(means)
    return float(np.sqrt(variance)) / len(axes)


def floor_of(samples: OpSamples) -> float | None:
    """Mean absolute error that the measurement's own repeats would show, as a fraction; None where nothing is known.

    From the spread s behind each time, or between rows of one batch: E|x| = s sqrt(2/pi) for normal noise. A timer's
    step d adds a uniform error of standard deviation d / sqrt(12); where there are no repeats it is all that is known.
    """
    spread = np.where(np.isfinite(samples.spread), samples.spread, np.nan)
    if np.isnan(spread).all():
        spread = _between_repeats(samples)
        if not np.nansum(spread) > 0:  # none, or copies of rows: they say nothing
            spread[:] = np.nan
    if np.isnan(spread).all():
        if not samples.resolution_us:
            return None
        spread = np.zeros(len(samples))
    step = samples.resolution_us / np.sqrt(12.0) / samples.time_us
    total = np.sqrt(spread**2 + step**2)
    return float(np.nanmean(total)) * float(np.sqrt(2 / np.pi))


def _between_repeats(samples: OpSamples) -> FloatArray:
    columns = np.column_stack([np.asarray(values, np.float64) for values in samples.columns.values()])
    _, index = np.unique(columns, axis=0, return_inverse=True)
    index = index.ravel()
    count = np.bincount(index)
    mean = np.bincount(index, weights=samples.time_us) / count
    square = np.bincount(index, weights=(samples.time_us / mean[index] - 1) ** 2)
    spread = np.sqrt(square / np.maximum(count - 1, 1))
    return np.where(count[index] > 1, spread[index], np.nan)


def report(parts: Sequence[tuple[OpSamples, HeldOut, str]], axis: str) -> dict[str, Any] | None:
    """Held-out errors of one operator along one axis, over all of its keys: None where nothing was held out.

    Returns:
        `summarize`'s fields for rows inside, `outside` with the same fields, the MAPE of the naive fits on the same
        rows inside (`naive`), and `noise_floor`.
    """
    measured: dict[bool, list[FloatArray]] = {True: [], False: []}
    predicted: dict[bool, list[FloatArray]] = {True: [], False: []}
    groups: dict[bool, list[FloatArray]] = {True: [], False: []}
    naive: dict[str, list[FloatArray]] = {name: [] for name in NAIVE}
    for samples, held, name in parts:
        for inside in (True, False):
            part = held.part(axis, inside)
            measured[inside].append(samples.time_us[held.row[part]])
            if part.any():
                predicted[inside].append(held.predicted[name][part])
                groups[inside].append(np.asarray(held.group[part], np.float64))
                if inside:
                    for fit in filter(held.predicted.__contains__, NAIVE):
                        naive[fit].append(np.abs(held.predicted[fit][part] / samples.time_us[held.row[part]] - 1))
    if not predicted[True] and not predicted[False]:
        return None
    found = {
        inside: summarize(
            np.concatenate(measured[inside]),
            np.concatenate([*predicted[inside], np.zeros(0)]),
            groups=np.concatenate([*groups[inside], np.zeros(0)]),
        )
        for inside in (True, False)
    }
    floors = [(len(samples), floor_of(samples)) for samples, _, _ in parts]
    known = [(n, floor) for n, floor in floors if floor is not None]
    return {
        **found[True],
        "outside": found[False],
        "naive": {name: float(np.concatenate(errors).mean()) for name, errors in naive.items() if errors},
        "noise_floor": sum(n * floor for n, floor in known) / sum(n for n, _ in known) if known else None,
    }
