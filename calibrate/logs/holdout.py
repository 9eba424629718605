"""Requests simulated with prices that have not seen their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.logs.fit import GROWTH, LogFit, fit_logs
from kvtwin.calibrate.logs.log import Log, name_of
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.vllm.simulate import simulate

Progress = Callable[[str], None]

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def held_out(logs: Sequence[Log], chosen: LogFit, tell: Progress) -> dict[str, Any]:
    """Errors of TTFT, TPOT and latency on requests whose times no price has seen."""
    found = _judged(logs, chosen, tell)
    accuracy = {name: _summary(times[0], times[1]) for name, times in _joined(found).items()}
    if len(logs) > 1:
        for index, (log, one) in enumerate(zip(logs, found, strict=True)):
            accuracy |= {
                f"{name} of {name_of(log, index)}": _summary(times[0], times[1]) for name, times in one.items()
            }
    return accuracy


def _judged(logs: Sequence[Log], chosen: LogFit, tell: Progress) -> list[dict[str, FloatArray]]:
    """Held-out times of each log (`judge_log`); `chosen` is the fit to the earlier half of a single log."""
    if len(logs) == 1:
        tell("held out: later half")
        return [judge_log(logs[0].halves()[1], chosen.latency)]
    start = dict(zip(chosen.features, chosen.prices_ns.tolist(), strict=True))
    found = []
    for index, log in enumerate(logs):
        tell(f"held out: {index + 1}")
        fit = fit_logs([*logs[:index], *logs[index + 1 :]], chosen.features, start)
        found.append(judge_log(log, fit.latency))
    return found


def _joined(found: Sequence[Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
    return {name: np.concatenate([one[name] for one in found], axis=1) for name in found[0]}


def held_out_requests(logs: Sequence[Log], profile: Profile) -> dict[str, FloatArray]:
    """Measured and simulated milliseconds of held-out requests, as `judge_log`, from fits with a profile's features.

    Args:
        logs: what the profile was fitted on.
        profile: of `calibrate_logs`.
    """
    names = list(GROWTH)
    features = tuple(
        feature for name in names[: names.index(profile.provenance["features"]) + 1] for feature in GROWTH[name]
    )
    fit = fit_logs([logs[0].halves()[0]] if len(logs) == 1 else logs, features)
    return _joined(_judged(logs, fit, lambda _: None))


def judge_log(log: Log, latency: LatencyModel) -> dict[str, FloatArray]:
    """Measured and simulated milliseconds of the usable requests, shape (2, n) each: ttft, tpot, latency.

    Requests without a measured time are left out.
    """
    twin = simulate(log.run, log.config, latency, record_steps=False)
    both = np.stack([log.times(log.run), log.times(twin)])[:, :, log.rows] / 1e6
    gaps = np.maximum(log.run.requests.column("output_tokens").to_numpy()[log.rows] - 1, 1)
    parts = {"ttft": both[:, 0], "tpot": both[:, 1] / gaps, "latency": both[:, 0] + np.nan_to_num(both[:, 1])}
    return {name: times[:, np.isfinite(times).all(axis=0)] for name, times in parts.items()}


def _summary(measured: FloatArray, simulated: FloatArray) -> dict[str, Any]:
    """Errors request by request, and of the distributions: mean, p50, p90, p99."""
    ratios = {"mean": float(simulated.mean() / measured.mean() - 1)} if len(measured) else {}
    if len(measured):
        ratios |= {
            name: float(np.quantile(simulated, q) / np.quantile(measured, q) - 1) for name, q in _QUANTILES.items()
        }
    return {**summarize(measured, simulated), "distribution": ratios}
