"""Recorded steps -> fitted regression: prices per step, per token, per (query, key) pair, with hold-out errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.agree import agreed_facts
from kvtwin.calibrate.design import Limits, next_batches
from kvtwin.calibrate.diagnostics import diagnose
from kvtwin.calibrate.frontend import fit_frontend, frontend_accuracy
from kvtwin.calibrate.host import fit_host_time, host_accuracy
from kvtwin.calibrate.identify import find_doubt
from kvtwin.calibrate.noise import run_floor, step_floor
from kvtwin.calibrate.robust import fit_with_speeds, residual_weights
from kvtwin.calibrate.steps.holdout import held_out
from kvtwin.calibrate.steps.regression import FEATURE_SETS, StepRegression
from kvtwin.calibrate.steps.samples import TIME_BLOCKS, Samples, checked_steps, names_of
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.regression import RegressionLatency, design
from kvtwin.sim.latency.stats import COLUMNS, REGIMES, BatchStats, IntArray, durations_ns
from kvtwin.traces.run import Run

Progress = Callable[[str], None]


# What `calibrate_steps` tells its `progress`, in order.
STAGES: Final = (*(f"features: {name}" for name in FEATURE_SETS), "host time, noise floor and doubt")


def calibrate_steps(runs: Sequence[Run], *, test: Sequence[Run] = (), progress: Progress | None = None) -> Profile:
    """Fit a step-latency profile on the `steps` tables of recorded runs.

    **Choice of features.** Each of the nested `FEATURE_SETS` predicts every step from a fit that has not seen it:
    whole runs are left out in turn; of a single run, five contiguous stretches of time (neighbours share the
    machine's speed of the moment, so a random split would let a fit look at its own exam). The loss is the gamma
    deviance y/p - 1 - log(y/p), which the true mean minimises and which has no unit (a MAPE would prefer whatever
    predicts too little). The simplest set wins whose loss is within one standard error of the best (Breiman et al.
    1984, section 3.4.3); the standard error is of the difference on the same steps, with its rows' dependence
    on one another (`dependence.py`), as the drift of the machine hits both alike.

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
            batch; times in another unit than they say; recordings of different engines, hardware, models or
            tensor-parallel degrees.
    """
    agreed_facts([*runs, *test])
    data = Samples.of(runs)
    tell = progress or (lambda _: None)
    predictions = _predict_with_each(data, tell)
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
            **_method(data, chosen, predictions),
            "host_time": host_note,
            "frontend_time": frontend_note,
            **_speeds(data, FEATURE_SETS[chosen]),
            **_doubt(data, fitted, runs),
            "kvtwin": version("kvtwin"),
        },
    )


def _predict_with_each(data: Samples, tell: Progress) -> dict[str, FloatArray]:
    """Every step predicted with each feature set, by fits that have not seen it."""
    predictions = {}
    for stage, name in zip(STAGES, FEATURE_SETS, strict=False):
        tell(stage)
        predictions[name] = held_out(data.batches, data.latency_ns, data.fold, FEATURE_SETS[name], data.day)
    return predictions


def _method(data: Samples, chosen: str, predictions: Mapping[str, FloatArray]) -> dict[str, Any]:
    """On what the profile was fitted, and how."""
    return {
        "method": "gamma quasi-likelihood with Huber weights, non-negative coefficients",
        "runs": [
            {"name": name, "steps": len(rows), "sha256": digest}
            for name, rows, digest in zip(data.names, data.rows, data.digests, strict=True)
        ],
        "held_out": "whole runs in turn" if len(data.names) > 1 else f"{TIME_BLOCKS} contiguous stretches of time",
        "features": chosen,
        "features_tried": _scores(data, predictions),
    }


def _choose(data: Samples, predictions: Mapping[str, FloatArray]) -> str:
    """The simplest feature set within one standard error of the best."""
    losses = {name: data.loss(predicted) for name, predicted in predictions.items()}
    best = min(losses, key=lambda name: float(losses[name].mean()))
    for name, loss in losses.items():
        excess = loss - losses[best]
        if name == best or excess.mean() <= stats.standard_error(excess):
            return name
    raise AssertionError("the best set is one of them")


def _scores(data: Samples, predictions: Mapping[str, FloatArray]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "deviance": float(data.loss(predicted).mean()),
            "mape": stats.mape(data.latency_ns, predicted),
        }
        for name, predicted in predictions.items()
    }


def _accuracy(data: Samples, predicted: FloatArray) -> dict[str, Any]:
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


def _tested(latency: RegressionLatency, runs: Sequence[Run], test: Sequence[Run]) -> dict[str, Any]:
    """Errors on runs that took no part in the fit, with their floors and the ratios of the MAPE to these."""
    found: dict[str, Any] = {}
    for run, name in zip(test, names_of(test), strict=True):
        steps = checked_steps(run)
        batches, measured = BatchStats.of_steps(steps), durations_ns(steps)
        summary = summarize(measured, latency.step_ns(batches, 0))
        others = [other for other in (*test, *runs) if other is not run and _workload(other) == _workload(run)]
        floors = asdict(run_floor(run, others))
        ratios = {
            kind: summary["mape"] / floors[kind] if floors[kind] else None for kind in ("repeat", "known", "within")
        }
        found[f"test: {name}"] = {**summary, "floor": floors, "ratio": ratios}
    return found


def _speeds(data: Samples, features: Sequence[str]) -> dict[str, Any]:
    """How long each run's steps take beside the mean of the runs, where they are told apart."""
    if data.day is None:
        return {}
    slowness = fit_with_speeds(design(data.batches, features), data.latency_ns, data.day)[1]
    return {"slowness": dict(zip(data.names, np.round(slowness, 6).tolist(), strict=True))}


def _doubt(data: Samples, fitted: StepRegression, runs: Sequence[Run]) -> dict[str, Any]:
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


def _workload(run: Run) -> bytes:
    """The same for repeated recordings of one workload."""
    lengths = [run.requests.column(name).to_numpy().tobytes() for name in ("input_tokens", "output_tokens")]
    return hashlib.sha256(b"/".join(lengths)).digest()


def _range(values: IntArray) -> tuple[float, float]:
    return (float(values.min()), float(values.max()))
