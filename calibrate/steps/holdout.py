"""Steps predicted by fits that have not seen them, and how the error falls with their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.steps.regression import FEATURE_SETS, StepRegression
from kvtwin.calibrate.steps.samples import Samples
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.traces.run import Run

_CURVE_REPEATS: Final = 5


def held_out(
    batches: BatchStats,
    latency_ns: FloatArray,
    fold: IntArray,
    features: Sequence[str],
    day: IntArray | None = None,
) -> FloatArray:
    """Predict every step from a fit on the steps of all other folds, in nanoseconds: shape (n,).

    Args:
        batches: n batches.
        latency_ns: how long each took, shape (n,).
        fold: label of the part each step is left out with, shape (n,); at least two different ones.
        features: of the regression.
        day: see `StepRegression.fit`.
    """
    predicted = np.empty(len(batches))
    for part in np.unique(fold):
        left_out = fold == part
        rest = None if day is None else day[~left_out]
        fitted = StepRegression(features).fit(batches[~left_out], latency_ns[~left_out], rest)
        predicted[left_out] = fitted.to_latency().step_ns(batches[left_out], 0)
    return predicted


@dataclass(frozen=True)
class HeldOutSteps:
    """Steps with predictions from fits that have not seen them.

    Attributes:
        batches: n batches.
        measured_ns, predicted_ns: shape (n,).
    """

    batches: BatchStats
    measured_ns: FloatArray
    predicted_ns: FloatArray


def held_out_steps(runs: Sequence[Run], profile: Profile) -> HeldOutSteps:
    """The predictions behind the errors of a profile of `calibrate_steps`, from the runs it was fitted on."""
    data = Samples.of(runs)
    features = FEATURE_SETS[profile.provenance["features"]]
    predicted = held_out(data.batches, data.latency_ns, data.fold, features, data.day)
    return HeldOutSteps(data.batches, data.latency_ns, predicted)


def learning_curve(runs: Sequence[Run], profile: Profile, *, seed: int = 0) -> list[dict[str, Any]]:
    """Held-out error by the number of steps fitted on, with the profile's features.

    Of the steps outside each fold, n are drawn at random, _CURVE_REPEATS times for every fold; the errors are those
    of the fold.

    Returns:
        `n`, and `mape` of each repeat, by rising n: powers of two from 2^5 on, and all there are.
    """
    data = Samples.of(runs)
    features = FEATURE_SETS[profile.provenance["features"]]
    rng = stats.stream(seed, "learning curve")
    parts = [data.fold == part for part in np.unique(data.fold)]
    most = min(int(np.count_nonzero(~part)) for part in parts)
    points = []
    for number in [*(1 << power for power in range(5, most.bit_length()) if 1 << power < most), most]:
        errors = []
        for _ in range(_CURVE_REPEATS):
            sizes = []
            for part in parts:
                drawn = rng.choice(np.flatnonzero(~part), number, replace=False)
                fitted = StepRegression(features).fit(data.batches[drawn], data.latency_ns[drawn]).to_latency()
                predicted = fitted.step_ns(data.batches[part], 0)
                sizes.append(np.abs(stats.relative_errors(data.latency_ns[part], predicted.astype(np.float64))))
            errors.append(float(np.concatenate(sizes).mean()))
        points.append({"n": number, "mape": errors})
    return points
