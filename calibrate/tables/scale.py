"""Unseen hardware from few samples: scale a fitted reference, or fit the physics alone.

    time = (offset + slope * r + bend * max(r - knot, 0)) * own(op, r),  r = the reference's time for the same batch

`offset` is the difference of launch floors; `slope` and `bend` are the speeds of small (memory-bound) and of large
(compute-bound) work. Simpler laws are tried first: one factor; floor and slope; floor, slope and bend. The one with the
smallest leave-one-out error on the samples is taken, the simpler one where they are equal within a standard error.
Operators then get a factor of their own, with a tilt over sizes, drawn towards 1 (no tilt) as far as samples are few.
With ten samples and more, physics of the operator's own (`fit_models`) may take the scaled reference's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.tables.candidates import Trend
from kvtwin.calibrate.tables.checks import MIN_ROWS, prepare
from kvtwin.calibrate.tables.prices import relative_nnls
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.operators import MIN_TIME_US, OperatorModel, OperatorTable, Scale
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.work.terms import TILES, terms
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

LEARNING: Final = (10, 30, 100)
_DRAWS: Final = 10  # repetitions behind each figure of the learning table
_FOLDS: Final = 5
_PHYSICS_FROM: Final = 10  # samples
_ANCHORS: Final = 60  # rows at which physics also looks at the scaled reference ...
_ANCHOR_SAMPLES: Final = 3.0  # ... which count together as much as this many samples
_OTHER_MACHINE: Final = ("version", "framework", "kernel_source", "attention_backend", "hardware", "model")
_PRIOR_SAMPLES: Final = 0.3  # an operator's own factor counts for half once it has this many samples
_TILT_OCTAVES: Final = 2.0  # over which an operator's own tilt moves by as much as its level
_REWEIGHTS: Final = 8  # rounds of reweighted least squares
_SMALL_ERROR: Final = 0.02
_LAWS: Final = ("factor", "floor and slope", "floor, slope and bend")


@dataclass(frozen=True)
class _Rows:
    """All rows of the new table whose operator the reference knows: arrays of shape (n,)."""

    measured_us: FloatArray
    reference_us: FloatArray
    op: npt.NDArray[np.int64]
    models: Sequence[OperatorModel]
    samples: Sequence[OpSamples]


def scale_profile(table: OpTable, reference: Profile, *, num_samples: int, seed: int, hardware: str | None) -> Profile:
    """A profile of new hardware: the reference's models, scaled on `num_samples` rows of `table` drawn at random.

    The other rows of `table` only judge. The learning table draws 10, 30, 100 and `num_samples` rows ten times each.

    Raises:
        InputError: the reference holds no operators, or none of the table's; too few rows.
    """
    rows = _matched(prepare(table), reference)
    n = len(rows.measured_us)
    if not 2 <= num_samples < n - MIN_ROWS:
        raise InputError(f"--samples {num_samples}: 2 to {n - MIN_ROWS - 1} of this table's {n} rows", path=table.path)
    rng = np.random.default_rng(seed)
    drawn = _draw(rows, num_samples, rng)
    law, models = fit_models(rows, drawn)
    judged = np.ones(n, np.bool_)
    judged[drawn] = False
    predicted = _predict(rows, models)
    accuracy = {
        f"{name}, not sampled": summarize(
            rows.measured_us[here], predicted[here], groups=np.arange(np.count_nonzero(here))
        )
        for name, here in _parts(rows, judged)
    }
    return Profile(
        kind="operators",
        latency=OperatorTable(models).to_json(),
        hardware=hardware or table.facts.get("hardware"),
        model=table.facts.get("model"),
        engine=table.facts.get("engine"),
        accuracy=accuracy,
        provenance={
            "sources": [dict(table.source)],
            "seed": seed,
            "samples": num_samples,
            "sampled_rows": sorted({int(row) for row in _row_numbers(rows)[drawn]}),
            "law": law,
            "reference": {"hardware": reference.hardware, "engine": reference.engine},
            "learning": learning(rows, sorted({*LEARNING, num_samples}), seed),
            "unscaled_mape": float(np.mean(np.abs(rows.reference_us / rows.measured_us - 1))),
        },
    )


def fit_models(rows: _Rows, drawn: npt.NDArray[np.intp]) -> tuple[str, list[OperatorModel]]:
    """Models of every operator from the drawn rows, and what they are: the scaled reference, or physics of its own.

    Physics takes the drawn rows and, as weak evidence, the scaled reference at other rows of the table (whose own times
    it does not see). It is taken where it predicts drawn rows better than the scaled reference, both fitted without
    them (five folds).
    """
    law, scaled = _scaled(rows, drawn)
    if len(drawn) < _PHYSICS_FROM:
        return law, scaled
    folds = np.arange(len(drawn)) % _FOLDS
    errors = {"scaled": 0.0, "physics": 0.0}
    for fold in range(_FOLDS):
        train, test = drawn[folds != fold], drawn[folds == fold]
        base = _scaled(rows, train)[1]
        for name, models in (("scaled", base), ("physics", _physics(rows, train, base))):
            errors[name] += float(np.abs(_predict_at(rows, models, test) / rows.measured_us[test] - 1).sum())
    if errors["physics"] < errors["scaled"]:
        return f"physics on samples and {law}", _physics(rows, drawn, scaled)
    return law, scaled


def _scaled(rows: _Rows, drawn: npt.NDArray[np.intp]) -> tuple[str, list[OperatorModel]]:
    law, scales = fit_scales(rows.reference_us[drawn], rows.measured_us[drawn], rows.op[drawn], len(rows.models))
    return law, [model.scaled(scale) for model, scale in zip(rows.models, scales, strict=True)]


def _physics(rows: _Rows, drawn: npt.NDArray[np.intp], scaled: Sequence[OperatorModel]) -> list[OperatorModel]:
    """Prices of each operator's terms, fitted to its drawn rows and to the scaled reference at `_ANCHORS` rows."""
    found = []
    first = 0
    for index, (model, samples) in enumerate(zip(scaled, rows.samples, strict=True)):
        own = drawn[rows.op[drawn] == index] - first
        anchors = np.linspace(0, len(samples) - 1, min(_ANCHORS, len(samples))).astype(np.intp)
        known = rows.reference_us[first + anchors]
        guess = model.scale.apply(known) if model.scale is not None else known
        times = np.concatenate([samples.time_us[own], np.maximum(guess, MIN_TIME_US)])
        weights = np.concatenate([np.ones(len(own)), np.full(len(anchors), _ANCHOR_SAMPLES / len(anchors))])
        found.append(_weighted_trend(samples.where(np.concatenate([own, anchors])), times, weights))
        first += len(samples)
    return found


def _weighted_trend(samples: OpSamples, time_us: FloatArray, weights: FloatArray) -> OperatorModel:
    columns = {name: np.asarray(values, np.float64) for name, values in samples.columns.items()}
    columns |= {name: np.full(len(samples), value) for name, value in samples.constants.items()}
    best: tuple[float, float, dict[str, float]] | None = None
    for tile in TILES.get(samples.work, (128.0,)):
        found = terms(samples.work, columns, tile, 0.0)
        prices = relative_nnls(found, time_us, weights)
        total = sum((price * found[name] for name, price in prices.items()), np.zeros(len(time_us)))
        error = float(weights @ np.abs(total / time_us - 1))
        if best is None or error < best[0]:
            best = (error, tile, prices)
    assert best is not None
    return OperatorModel(samples.op, samples.work, samples.key, samples.constants, best[2], best[1])


def fit_scales(
    reference_us: FloatArray, measured_us: FloatArray, op: npt.NDArray[np.int64], num_ops: int
) -> tuple[str, list[Scale]]:
    """The law and each operator's scale, from samples of shape (n,)."""
    law = _choose_law(reference_us, measured_us)
    common = _fit_law(law, reference_us, measured_us)
    rest = measured_us / np.maximum(common.apply(reference_us), 1e-9)
    place = octave(reference_us)
    return law, [_own(common, rest[op == index], place[op == index]) for index in range(num_ops)]


def _own(common: Scale, rest: FloatArray, place: FloatArray) -> Scale:
    """An operator's own factor and its tilt over octaves of size: ridge regression towards 1 and 0."""
    if not len(rest):
        return common
    centre = float(place.mean())
    design = np.column_stack([np.ones(len(place)), (place - centre) / _TILT_OCTAVES])
    weight = design / np.maximum(rest, 1e-9)[:, None]  # relative to the measurement
    target = (rest - 1.0) / np.maximum(rest, 1e-9)
    prior = _PRIOR_SAMPLES * np.mean(weight[:, 0] ** 2) * np.eye(2)
    level, tilt = np.linalg.solve(weight.T @ weight + prior, weight.T @ target).tolist()
    return replace(common, factor=max(1.0 + level, 0.1), tilt=tilt / _TILT_OCTAVES, centre=centre)


def _fit_law(law: str, reference_us: FloatArray, measured_us: FloatArray) -> Scale:
    """By least absolute relative error, so that a few odd kernels do not bend the law for all."""
    knot = float(np.median(reference_us))
    if law == _LAWS[0]:
        ratio = measured_us / reference_us
        return Scale(0.0, float(np.median(ratio)), 0.0, 0.0)
    found = {"offset": np.ones(len(reference_us)), "slope": reference_us}
    if law == _LAWS[2]:  # below and above the knot, so that either side may be the dearer one
        below, above = np.minimum(reference_us, knot), np.maximum(reference_us - knot, 0.0)
        found = {"offset": found["offset"], "below": below, "above": above}
    weights = np.ones(len(reference_us))
    prices: dict[str, float] = {}
    for _ in range(_REWEIGHTS):
        prices = relative_nnls(found, measured_us, weights)
        total = sum((price * found[name] for name, price in prices.items()), np.zeros(len(reference_us)))
        weights = 1.0 / np.maximum(np.abs(total / measured_us - 1), _SMALL_ERROR)
    if law == _LAWS[2]:
        slope = prices.get("below", 0.0)
        return Scale(prices.get("offset", 0.0), slope, prices.get("above", 0.0) - slope, knot)
    return Scale(prices.get("offset", 0.0), prices.get("slope", 0.0), 0.0, 0.0)


def _choose_law(reference_us: FloatArray, measured_us: FloatArray) -> str:
    errors = {}
    for law, least in zip(_LAWS, (2, 4, 8), strict=True):
        if len(measured_us) >= least:
            errors[law] = _left_one_out(law, reference_us, measured_us)
    best = min(errors, key=lambda law: float(errors[law].mean()))
    for law in _LAWS:
        if law in errors:
            behind = errors[law] - errors[best]
            if behind.mean() <= behind.std() / np.sqrt(len(behind)) and behind.mean() <= 0.1 * errors[best].mean():
                return law
    return best


def _left_one_out(law: str, reference_us: FloatArray, measured_us: FloatArray) -> FloatArray:
    found = np.empty(len(measured_us))
    for at in range(len(measured_us)):
        keep = np.arange(len(measured_us)) != at
        scale = _fit_law(law, reference_us[keep], measured_us[keep])
        found[at] = abs(float(scale.apply(reference_us[at : at + 1])[0]) / measured_us[at] - 1)
    return found


def learning(rows: _Rows, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """MAPE on rows not sampled, by number of samples: mean, and 10 to 90 % of the draws."""
    found = []
    for size in sizes:
        if size >= len(rows.measured_us) - MIN_ROWS:
            continue
        errors = []
        for draw in range(_DRAWS):
            drawn = _draw(rows, size, np.random.default_rng([seed, size, draw]))
            error = np.abs(_predict(rows, fit_models(rows, drawn)[1]) / rows.measured_us - 1)
            error[drawn] = np.nan
            errors.append(float(np.nanmean(error)))
        low, high = np.quantile(errors, [0.1, 0.9]).tolist()
        found.append({"samples": size, "mape": float(np.mean(errors)), "low": low, "high": high})
    return found


def roofline_learning(table: OpTable, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """The same without a reference: the physics of each operator fitted on `size` of its rows, judged on the others."""
    found = []
    samples = [sample.where(~sample.suspect) for sample in prepare(table).samples]
    for size in sizes:
        errors = []
        for sample in samples:
            if size >= len(sample) - MIN_ROWS:
                continue
            drawn = np.random.default_rng([seed, size]).choice(len(sample), size, replace=False)
            fitted = Trend([]).fit(sample.where(drawn))
            error = np.abs(fitted.time_us(sample.columns) / sample.time_us - 1)
            errors.append(np.delete(error, drawn))
        if errors:
            found.append({"samples": size, "mape": float(np.concatenate(errors).mean())})
    return found


# ---- rows ----------------------------------------------------------------------------------------------------


def _matched(table: OpTable, reference: Profile) -> _Rows:
    if reference.kind != "operators":
        raise InputError(f"--reference is a {reference.kind} profile: one calibrated from operator tables expected")
    known = OperatorTable.from_json(reference.latency).models
    models: list[OperatorModel] = []
    samples: list[OpSamples] = []
    measured, predicted, op = [], [], []
    for sample in table.samples:
        model = _same_operator(sample, known)
        if model is None:
            continue
        kept = sample.where(~sample.suspect)
        op.append(np.full(len(kept), len(models)))
        models.append(model.with_key(sample.key))
        samples.append(kept)
        measured.append(kept.time_us)
        predicted.append(model.time_us(kept.columns))
    if not models:
        ops = ", ".join(sorted({model.op for model in known}))
        raise InputError(f"none of these operators is in the reference, which has {ops}", path=table.path)
    return _Rows(np.concatenate(measured), np.concatenate(predicted), np.concatenate(op), models, samples)


def _same_operator(sample: OpSamples, known: Sequence[OperatorModel]) -> OperatorModel | None:
    """The reference's model of the same operator with the same key but for what the machine decides."""

    def agrees(model: OperatorModel) -> bool:
        shared = (set(model.key) & set(sample.key)) - set(_OTHER_MACHINE)
        same_columns = model.bank is None or set(model.bank.axes) <= set(sample.columns)
        return model.op == sample.op and same_columns and all(model.key[name] == sample.key[name] for name in shared)

    return next(filter(agrees, known), None)


def _draw(rows: _Rows, size: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Rows at random, spread over the operators as evenly as they allow."""
    order = rng.permutation(len(rows.op))
    turn = np.empty(len(order), np.int64)  # how many rows of the same operator come earlier
    seen: dict[int, int] = {}
    for place, row in enumerate(order.tolist()):
        op = int(rows.op[row])
        turn[place] = seen[op] = seen.get(op, -1) + 1
    return order[np.argsort(turn, kind="stable")[:size]]


def _predict(rows: _Rows, models: Sequence[OperatorModel]) -> FloatArray:
    found = np.empty(len(rows.measured_us))
    for index, (model, samples) in enumerate(zip(models, rows.samples, strict=True)):
        here = rows.op == index
        if model.scale is not None:  # the reference's own times are at hand
            found[here] = model.scale.apply(rows.reference_us[here])
        else:
            found[here] = model.time_us(samples.columns)
    return np.maximum(found, MIN_TIME_US)


def _predict_at(rows: _Rows, models: Sequence[OperatorModel], at: npt.NDArray[np.intp]) -> FloatArray:
    found = np.empty(len(at))
    first = 0
    for index, (model, samples) in enumerate(zip(models, rows.samples, strict=True)):
        here = rows.op[at] == index
        if here.any():
            if model.scale is not None:
                found[here] = model.scale.apply(rows.reference_us[at[here]])
            else:
                found[here] = model.time_us(samples.where(at[here] - first).columns)
        first += len(samples)
    return np.maximum(found, MIN_TIME_US)


def _parts(rows: _Rows, judged: npt.NDArray[np.bool_]) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    parts = [("all operators", judged)]
    names: Mapping[str, list[int]] = {}
    for index, model in enumerate(rows.models):
        names = {**names, model.op: [*names.get(model.op, []), index]}
    if len(names) > 1:
        parts += [(name, judged & np.isin(rows.op, indexes)) for name, indexes in names.items()]
    return [(name, here) for name, here in parts if here.any()]


def _row_numbers(rows: _Rows) -> npt.NDArray[np.int64]:
    return np.concatenate([sample.rows for sample in rows.samples])
