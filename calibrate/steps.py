"""Recorded steps -> fitted regression: prices per step, per token, per (query, key) pair, with hold-out errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate import stats
from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.agree import agreed_facts, place_of
from kvtwin.calibrate.design import Limits, next_batches
from kvtwin.calibrate.diagnostics import diagnose
from kvtwin.calibrate.frontend import fit_frontend, frontend_accuracy
from kvtwin.calibrate.host import fit_host_time, host_accuracy
from kvtwin.calibrate.identify import find_doubt
from kvtwin.calibrate.noise import run_floor, step_floor
from kvtwin.calibrate.robust import fit_nonnegative, fit_with_speeds, residual_weights
from kvtwin.calibrate.units import refuse_wrong_units
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.regression import FEATURES, TOKEN_KNOTS, RegressionLatency, design
from kvtwin.sim.latency.stats import COLUMNS, REGIMES, BatchStats, IntArray, durations_ns
from kvtwin.traces.errors import InputError, KvtwinError
from kvtwin.traces.run import Run

Progress = Callable[[str], None]

MIN_STEPS: Final = 50  # fewer cannot be split into a part to fit and a part to judge
_MIN_DAYS: Final = 3  # recordings from which the speed of each is told apart
_CURVE_REPEATS: Final = 5
_TIME_BLOCKS: Final = 5  # hold-out parts of a single recording

# What each set adds to the one before it, simplest first; the last one holds every feature.
_GROWTH: Final[Mapping[str, tuple[str, ...]]] = {
    "tokens": ("step", "num_tokens"),
    "context": ("decode_context",),
    "work": ("num_reqs", "prefill_pairs"),
    "roofline": ("prefill_step", *(f"tokens_over_{knot}" for knot in TOKEN_KNOTS)),
    "everything": tuple(FEATURES),
}


def _nested() -> dict[str, tuple[str, ...]]:
    sets: dict[str, tuple[str, ...]] = {}
    grown: tuple[str, ...] = ()
    for name, more in _GROWTH.items():
        grown = sets[name] = tuple(dict.fromkeys((*grown, *more)))
    return sets


FEATURE_SETS: Final[Mapping[str, tuple[str, ...]]] = _nested()


# What `calibrate_steps` tells its `progress`, in order.
STAGES: Final = (*(f"features: {name}" for name in FEATURE_SETS), "host time, noise floor and doubt")


class NotFittedError(KvtwinError):
    """A `StepRegression` was asked for coefficients before `fit`."""


class StepRegression:
    """Step latency as a sum of features, each with a price that is never negative.

        latency_ns = sum over features of coefficient * feature

    The fit is `robust.fit_nonnegative`: towards the mean latency, with bounded influence of stalls.

    Args:
        features: names out of `sim.latency.regression.FEATURES`.

    Attributes:
        coefficients_ns_: after `fit`: nanoseconds per unit of each feature, in the order of `features`.

    >>> batches = BatchStats(np.array([[n, 100 * n, 0, 100, 0, 0, 0, 0, 0] for n in range(1, 60)]))
    >>> fitted = StepRegression(["step", "num_reqs"]).fit(batches, 5000 + 20 * batches.num_reqs)
    >>> fitted.coefficients_ns_.round(6).tolist()
    [5000.0, 20.0]
    """

    def __init__(self, features: Sequence[str]) -> None:
        self.features = tuple(features)

    def fit(self, batches: BatchStats, latency_ns: npt.ArrayLike, day: IntArray | None = None) -> StepRegression:
        """Find the prices.

        Args:
            batches: n batches.
            latency_ns: how long each took, shape (n,), positive.
            day: which recording each comes from, shape (n,): its speed is then a parameter of its own, and the prices
                are those of the recordings' mean speed (`robust.fit_with_speeds`).

        Raises:
            InputError: an unknown feature.
            ValueError: a latency is not positive and finite, or not one per batch.
        """
        times = np.asarray(latency_ns, np.float64)
        if times.shape != (len(batches),) or not np.all((times > 0) & np.isfinite(times)):
            raise ValueError("one positive latency per batch expected")
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown:
            raise InputError(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
        columns = design(batches, self.features)
        self._found = fit_nonnegative(columns, times) if day is None else fit_with_speeds(columns, times, day)[0]
        return self

    @property
    def coefficients_ns_(self) -> FloatArray:
        """Nanoseconds per unit of each feature. Raises NotFittedError before `fit`."""
        try:
            return self._found
        except AttributeError:
            raise NotFittedError("this StepRegression has no coefficients yet: call fit(batches, latency_ns)") from None

    def to_latency(self) -> RegressionLatency:
        """The latency model of the features that cost something. Raises NotFittedError before `fit`."""
        prices = zip(self.features, self.coefficients_ns_.tolist(), strict=True)
        return RegressionLatency({name: price for name, price in prices if price > 0})


def calibrate_steps(runs: Sequence[Run], *, test: Sequence[Run] = (), progress: Progress | None = None) -> Profile:
    """Fit a step-latency profile on the `steps` tables of recorded runs.

    **Choice of features.** Each of the nested `FEATURE_SETS` predicts every step from a fit that has not seen it:
    whole runs are left out in turn; of a single run, five contiguous stretches of time (neighbours share the
    machine's speed of the moment, so a random split would let a fit look at its own exam). The loss is the gamma
    deviance y/p - 1 - log(y/p), which the true mean minimises and which has no unit (a MAPE would prefer whatever
    predicts too little). The simplest set wins whose loss is within one standard error of the best (Breiman et al.
    1984, section 3.4.3); the standard error is of the difference on the same steps, resampled in blocks of time, as
    the drift of the machine hits both alike.

    **What it aims at** is the mean speed of the recordings given. From three recordings on, the speed of each is a
    parameter of its own: otherwise prices would explain, by whatever batches a slow day happened to have, that the day
    was slow. Each recording then counts the same in the mean speed, and every step the same in the prices. With two,
    whose held-out fits rest on one, every step counts the same. Another recording lies off by its own speed: see the
    errors by run, the speeds and the noise floor.

    **Runs to test on** take no part in anything: the finished profile predicts them, beside their noise floors.

    The hold-out errors are those of the chosen set; choosing among five adds next to nothing to them.

    Args:
        runs: recordings of one engine on one hardware, each with a `steps` table.
        test: further ones to judge the finished profile on.
        progress: called with each of STAGES when it begins.

    Raises:
        InputError: no run; fewer than MIN_STEPS steps; a run without steps; a step that took no time or has an empty
            batch; times in another unit than they say; recordings of different engines, hardware, models or tensor-parallel degrees.
    """
    agreed_facts([*runs, *test])
    data = _Samples.of(runs)
    tell = progress or (lambda _: None)
    predictions: dict[str, FloatArray] = {}
    for stage, name in zip(STAGES, FEATURE_SETS, strict=False):
        tell(stage)
        predictions[name] = held_out(data.batches, data.latency_ns, data.fold, FEATURE_SETS[name], data.day)
    chosen = _choose(data, predictions)
    fitted = StepRegression(FEATURE_SETS[chosen]).fit(data.batches, data.latency_ns, data.day)
    latency = fitted.to_latency()
    tell(STAGES[-1])
    between, host_note = fit_host_time(runs)
    host, frontend_note = fit_frontend(runs, between)
    return Profile(
        kind="regression",
        latency=latency.to_json(),
        host=host,
        **agreed_facts(runs),
        domain={name: _range(getattr(data.batches, name)) for name in COLUMNS},
        accuracy={
            **_accuracy(data, predictions[chosen]),
            **host_accuracy(runs),
            **frontend_accuracy(runs),
            **_floors(runs, data.names),
            **_tested(latency, runs, test),
        },
        provenance={
            "method": "gamma quasi-likelihood with Huber weights, non-negative coefficients",
            "runs": [
                {"name": name, "steps": len(rows), "sha256": digest}
                for name, rows, digest in zip(data.names, data.rows, data.digests, strict=True)
            ],
            "held_out": "whole runs in turn" if len(runs) > 1 else f"{_TIME_BLOCKS} contiguous stretches of time",
            "features": chosen,
            "features_tried": _scores(data, predictions),
            "host_time": host_note,
            "frontend_time": frontend_note,
            **_speeds(data, FEATURE_SETS[chosen]),
            **_doubt(data, fitted, runs),
            "kvtwin": version("kvtwin"),
        },
    )


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
    data = _Samples.of(runs)
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
    data = _Samples.of(runs)
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


@dataclass(frozen=True)
class _Samples:
    """All steps of all runs, one after the other.

    Attributes:
        batches, latency_ns: n rows.
        fold: which part a row is left out with, shape (n,).
        day: which run a row comes from, shape (n,); None for so few runs that their speeds are not told apart.
        names, rows, digests: by run; `rows` are the places of its steps.
    """

    batches: BatchStats
    latency_ns: FloatArray
    fold: IntArray
    day: IntArray | None
    names: tuple[str, ...]
    rows: tuple[range, ...]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> _Samples:
        """Check the runs and join them; see `calibrate_steps` for what is refused."""
        if not runs:
            raise InputError("no recording to calibrate on: at least one run with steps is needed")
        agreed_facts(runs)
        tables = [_checked(run) for run in runs]
        ends = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
        if ends[-1] < MIN_STEPS:
            raise InputError(f"{ends[-1]} steps in all: at least {MIN_STEPS} are needed to fit and to judge the fit")
        run_of = np.repeat(np.arange(len(runs)), np.diff(ends))
        return cls(
            batches=BatchStats(np.concatenate([BatchStats.of_steps(table).table for table in tables])),
            latency_ns=np.concatenate([durations_ns(table) for table in tables]).astype(np.float64),
            fold=run_of if len(runs) > 1 else np.arange(ends[-1]) * _TIME_BLOCKS // ends[-1],
            day=run_of if len(runs) >= _MIN_DAYS else None,
            names=_names(runs),
            rows=tuple(range(*bounds) for bounds in pairwise(ends)),
            digests=tuple(_digest(table) for table in tables),
        )

    def loss(self, predicted: FloatArray) -> FloatArray:
        """Gamma deviance of each step, halved."""
        ratio = self.latency_ns / predicted
        return ratio - 1 - np.log(ratio)


def _checked(run: Run) -> pa.Table:
    if not run.has("steps"):
        raise InputError("no steps table: step latencies are fitted to recorded steps", path=place_of(run))
    steps = run.steps
    if not steps.num_rows:
        raise InputError("the steps table is empty: nothing to calibrate on", path=place_of(run))
    bad = np.flatnonzero(durations_ns(steps) <= 0)
    if bad.size:
        start = steps.column("start_ns")[int(bad[0])].as_py()
        problem = f"the step ends where it starts ({start} ns): a duration of at least 1 ns expected"
        raise InputError(problem, path=place_of(run), row=int(bad[0]), column="end_ns")
    empty = np.flatnonzero(np.diff(steps.column("cache_len").combine_chunks().offsets.to_numpy()) == 0)
    if empty.size:
        raise InputError("the batch is empty", path=place_of(run), row=int(empty[0]), column="request")
    refuse_wrong_units(run)
    return steps


def _choose(data: _Samples, predictions: Mapping[str, FloatArray]) -> str:
    """The simplest feature set within one standard error of the best."""
    losses = {name: data.loss(predicted) for name, predicted in predictions.items()}
    best = min(losses, key=lambda name: float(losses[name].mean()))
    for name, loss in losses.items():
        excess = loss - losses[best]
        if name == best or excess.mean() <= stats.standard_error(excess):
            return name
    raise AssertionError("the best set is one of them")


def _scores(data: _Samples, predictions: Mapping[str, FloatArray]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "deviance": float(data.loss(predicted).mean()),
            "mape": stats.mape(data.latency_ns, predicted),
        }
        for name, predicted in predictions.items()
    }


def _accuracy(data: _Samples, predicted: FloatArray) -> dict[str, Any]:
    regime = data.batches.regime
    parts = {"steps": np.ones(len(predicted), np.bool_)}
    parts |= {f"{name} steps": regime == name for name in REGIMES if name in regime}
    for name, rows in zip(data.names, data.rows, strict=True):
        parts[f"steps of {name}"] = np.isin(np.arange(len(predicted)), rows)
    return {
        name: summarize(data.latency_ns[rows], predicted[rows])
        for name, rows in parts.items()
        if len(data.names) > 1 or not name.startswith("steps of ")
    }


def _floors(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """The noise floor of each workload that was recorded more than once."""
    repeats: dict[bytes, list[int]] = {}
    for index, run in enumerate(runs):
        repeats.setdefault(_workload(run), []).append(index)
    found: dict[str, Any] = {}
    for members in repeats.values():
        floor = step_floor([runs[index] for index in members]) if len(members) > 1 else None
        if floor is not None:
            label = ", ".join(names[index] for index in members)
            found[f"noise floor of {label}"] = {
                **floor.metrics, "matched": floor.matched, "pairs": floor.num_pairs, "drift": floor.drift,
            }  # fmt: skip
    return found


def _workload(run: Run) -> bytes:
    """The same for repeated recordings of one workload."""
    lengths = [run.requests.column(name).to_numpy().tobytes() for name in ("input_tokens", "output_tokens")]
    return hashlib.sha256(b"/".join(lengths)).digest()


def _tested(latency: RegressionLatency, runs: Sequence[Run], test: Sequence[Run]) -> dict[str, Any]:
    """Errors on runs that took no part in the fit, with their floors and the ratios of the MAPE to these."""
    found: dict[str, Any] = {}
    for run, name in zip(test, _names(test), strict=True):
        steps = _checked(run)
        batches, measured = BatchStats.of_steps(steps), durations_ns(steps)
        summary = summarize(measured, latency.step_ns(batches, 0))
        others = [other for other in (*test, *runs) if other is not run and _workload(other) == _workload(run)]
        floors = asdict(run_floor(run, others))
        ratios = {
            kind: summary["mape"] / floors[kind] if floors[kind] else None for kind in ("repeat", "known", "within")
        }
        found[f"test: {name}"] = {**summary, "floor": floors, "ratio": ratios}
    return found


def _speeds(data: _Samples, features: Sequence[str]) -> dict[str, Any]:
    """How long each run's steps take beside the mean of the runs, where they are told apart."""
    if data.day is None:
        return {}
    slowness = fit_with_speeds(design(data.batches, features), data.latency_ns, data.day)[1]
    return {"slowness": dict(zip(data.names, np.round(slowness, 6).tolist(), strict=True))}


def _doubt(data: _Samples, fitted: StepRegression, runs: Sequence[Run]) -> dict[str, Any]:
    """Intervals of the prices, diagnostics of the residuals, and what to measure next."""
    columns, prices = design(data.batches, fitted.features), fitted.coefficients_ns_
    predicted = columns @ prices
    rows, residual = columns / predicted[:, None], data.latency_ns / predicted - 1
    weight = residual_weights(residual)
    noise = float(np.sqrt(np.average(residual**2, weights=weight)))
    order = np.arange(len(residual))
    settings: dict[str, Any] = {}
    for run in runs:
        settings |= {key: value for key, value in run.info.engine_config.items() if value is not None}
    limits = Limits.of(settings, data.batches)
    return {
        "doubt": find_doubt(fitted.features, prices, residual, rows, weight, order).to_json(),
        "diagnostics": diagnose(data.batches, data.latency_ns, columns, prices),
        "next_batches": next_batches(fitted.features, prices, rows, limits, noise=noise),
    }


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Short names, made unique by a number where needed."""
    names: list[str] = []
    for index, run in enumerate(runs):
        place = place_of(run)
        name = Path(place).name if place else f"run {index + 1}"
        names.append(name if name not in names else f"{name} ({index + 1})")
    return tuple(names)


def _digest(steps: pa.Table) -> str:
    """SHA-256 of times and batches: the same for a recording and for the run folder imported from it."""
    digest = hashlib.sha256()
    cache_len = steps.column("cache_len").combine_chunks()
    input_len = steps.column("input_len").combine_chunks()
    sizes = np.diff(cache_len.offsets.to_numpy())
    starts, ends = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    for values in (starts, ends, sizes, cache_len.flatten().to_numpy(), input_len.flatten().to_numpy()):
        digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def _range(values: IntArray) -> tuple[float, float]:
    return (float(values.min()), float(values.max()))
