"""Request logs alone -> step prices: simulate the log, compare first tokens and decode times, correct the prices.

A log has no step in it. But what a request waited for its first token, and from there for its last, is a sum of
steps, and a simulation says of which: of so many steps, of so many prompt tokens, of so much context read. So:

1. simulate the log with the prices of the moment, and add up each feature over each request's two windows (from the
   queue to the first token, from there to the last);
2. find the prices that turn these sums into the *measured* times: non-negative, relative least squares with the
   weights of the soft absolute value 2 (sqrt(1 + z^2) - 1), as some requests meet stalls; the two kinds of time are
   scaled by their robust standard deviations;
3. move most of the way there and begin again, as other prices make other batches, until nothing moves. Every
   simulation is a whole one, so a fixed point explains the queues as well. What is left of the movement is the jitter
   of scheduling decisions: the last prices are averaged over.

Minimising the distance by differences of simulations was tried: a simulation is a step function of its prices, and
the search ended early (TPOT of the held-out half of the RTX PRO 6000 run 6 % off after 50 s, here 1 % after 7 s).

What a log cannot tell (`identify.py`): the engine's own time between steps is part of every step, and two prices
whose features rise and fall together are known as a sum only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate import stats
from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.agree import agreed_facts, place_of
from kvtwin.calibrate.frontend import fit_frontend
from kvtwin.calibrate.identify import Doubt, find_doubt
from kvtwin.calibrate.units import refuse_implausible
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.regression import RegressionLatency, design
from kvtwin.sim.latency.stats import COLUMNS, BatchStats
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

Clock = Literal["queued_ns", "arrival_ns"]
Rows = npt.NDArray[np.bool_]
Progress = Callable[[str], None]

# What each model adds to the one before it, simplest first: a step's fixed cost (weights, launches, the engine's own
# work), the arithmetic of prompts, reading the KV cache, work per request, a prefill's own fixed cost, attention
# among a prompt's own tokens.
GROWTH: Final[Mapping[str, tuple[str, ...]]] = {
    "fixed": ("step",),
    "prompts": ("prefill_tokens",),
    "context": ("decode_context",),
    "requests": ("num_reqs",),
    "prefills": ("prefill_step",),
    "attention": ("prefill_pairs",),
}
MIN_REQUESTS: Final = 30  # with times; fewer say too little about prices and their doubt

_FIRST_SD: Final = 0.1  # of a logarithm, where no residual is known
_LEAST_SD: Final = 0.01
_STEP: Final = 0.7  # of the way to the new prices per iteration; all of it swings
_ROUNDS: Final = 16
_AVERAGED: Final = 6  # last rounds
_NOTHING: Final = 1e-4  # share of all time below which a price is no price
# The derivatives leave out that other prices make other batches. On 60 synthetic logs (tests/fidelity/test_logs.py)
# 95 % intervals without this factor cover the truth in 73 to 90 % of cases, with it in 90 to 100 %.
_WIDENED: Final = 1.5
_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Log:
    """A recorded workload, ready to be simulated.

    Attributes:
        run: requests with their times; prompts' blocks where prefix caching is on.
        config: the engine's settings.
        clock: what first-token times count from; the client's clock where the engine's is not recorded.
        rows: which requests' times may be used, shape (n,). The others are simulated all the same: they are load.
    """

    run: Run
    config: VllmConfig
    clock: Clock
    rows: Rows

    @classmethod
    def of(cls, run: Run, config: VllmConfig) -> Log:
        """All requests of a run.

        Raises:
            InputError: a time is not positive or in another unit than it says, or two engine instances served the
                requests.
        """
        table = run.requests
        clock: Clock = "arrival_ns" if table.column("queued_ns").null_count == table.num_rows else "queued_ns"
        log = cls(run, config, clock, np.ones(table.num_rows, np.bool_))
        log.check()
        return log

    def check(self) -> None:
        """Refuse times that no engine can have taken."""
        instances = set(self.run.requests.column("instance").drop_null().to_pylist())
        if len(instances) > 1:
            problem = f"{len(instances)} engine instances served these requests: split the log, one run per instance"
            raise InputError(problem, path=place_of(self.run), column="instance")
        times = self.times(self.run)
        bad = np.argwhere(times <= 0)
        if len(bad):
            kind, row = bad[0].tolist()
            name = ("first_token_ns", "finish_ns")[kind]
            before = (self.clock, "first_token_ns")[kind]
            problem = f"{times[kind, row]:.0f} ns after {before}: a positive time expected (check clocks and units)"
            raise InputError(problem, path=place_of(self.run), row=row, column=name)
        per_token = times[1] / np.maximum(self.run.requests.column("output_tokens").to_numpy() - 1, 1)
        if np.isfinite(per_token).any():
            refuse_implausible(float(np.nanmedian(per_token)), "an output token", self.run, "finish_ns")

    def only(self, rows: Rows) -> Log:
        """The same log with fewer usable times."""
        return replace(self, rows=self.rows & rows)

    def halves(self) -> tuple[Log, Log]:
        """The earlier and the later half of the requests by arrival: one to fit, one to judge."""
        earlier = np.arange(len(self.rows)) < len(self.rows) // 2
        return self.only(earlier), self.only(~earlier)

    def times(self, run: Run) -> FloatArray:
        """Nanoseconds from `clock` to the first token, and from there to the last: shape (2, n); NaN where unknown."""
        start, first, finish = (_floats(run, name) for name in (self.clock, "first_token_ns", "finish_ns"))
        several = run.requests.column("output_tokens").to_numpy() > 1
        return np.stack([first - start, np.where(several, finish - first, np.nan)])

    @property
    def num_known(self) -> int:
        """Usable requests whose first token has a time."""
        return int(np.isfinite(self.times(self.run)[0, self.rows]).sum())


def _floats(run: Run, name: str) -> FloatArray:
    values: FloatArray = run.requests.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return values


@dataclass(frozen=True)
class _Windows:
    """What one simulation of the logs says of every usable request's two times: rows are requests, first-token
    windows first, then decode windows; rows without a measured time are left out.

    Attributes:
        sums: features added up over each window, shape (n, k).
        simulated_ns, measured_ns: shape (n,).
        kind: 0 for first-token windows, 1 for decode windows.
        order: request's place in time, shape (n,).
    """

    sums: FloatArray
    simulated_ns: FloatArray
    measured_ns: FloatArray
    kind: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    @classmethod
    def of(cls, logs: Sequence[Log], features: tuple[str, ...], prices_ns: FloatArray) -> _Windows:
        sums, simulated, measured = zip(*(_simulate(log, features, prices_ns) for log in logs), strict=True)
        known = np.isfinite(np.concatenate(measured, axis=1))
        columns = [np.concatenate(part, axis=1)[known] for part in (sums, simulated, measured)]
        kind, order = np.nonzero(known)
        return cls(columns[0], np.maximum(columns[1], 1.0), columns[2], kind, order)

    @property
    def errors(self) -> FloatArray:
        """log(simulated / measured)."""
        found: FloatArray = np.log(self.simulated_ns / self.measured_ns)
        return found

    def scales(self) -> FloatArray:
        """Robust standard deviation of the errors of each kind."""
        return np.array([_scale(self.errors[self.kind == kind]) for kind in (0, 1)])


def _simulate(log: Log, features: tuple[str, ...], prices_ns: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Feature sums (2, n, k), simulated and measured times (2, n) of the usable requests of one log."""
    twin = simulate(log.run, log.config, _latency(features, prices_ns))
    steps = twin.steps
    columns = design(BatchStats.of_steps(steps), features)
    # What has been computed by when: flat between steps, rising while one runs.
    edges = np.column_stack([steps.column(name).to_numpy() for name in ("start_ns", "end_ns")]).ravel()
    total = np.zeros((len(edges), len(features)))
    total[1::2] = columns
    done = np.cumsum(total, axis=0)
    at = [
        np.column_stack([np.interp(_floats(twin, name), edges, part) for part in done.T])
        for name in (log.clock, "first_token_ns", "finish_ns")
    ]
    sums = np.stack([at[1] - at[0], at[2] - at[1]])
    return sums[:, log.rows], log.times(twin)[:, log.rows], log.times(log.run)[:, log.rows]


def _latency(features: Sequence[str], prices_ns: FloatArray) -> RegressionLatency:
    pairs = zip(features, prices_ns.tolist(), strict=True)
    return RegressionLatency({name: price for name, price in pairs if price > 0})


@dataclass(frozen=True)
class LogFit:
    """Prices found from a log.

    Attributes:
        latency: the fitted model; a feature whose price is 0 is not in it.
        features: of the fit.
        prices_ns: nanoseconds per unit of each feature.
        errors: log(simulated / measured) of every used time.
        kind: of each error: 0 first token, 1 decode.
        order: request's place in time of each error.
        sd: robust scale of the errors of each kind.
        doubt: how well each price is known.
    """

    latency: RegressionLatency
    features: tuple[str, ...]
    prices_ns: FloatArray
    errors: FloatArray
    kind: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    sd: FloatArray
    doubt: Doubt


def fit_logs(logs: Sequence[Log], features: Sequence[str], start: Mapping[str, float] | None = None) -> LogFit:
    """Find the prices of `features` that explain the first-token and decode times of the logs' usable requests.

    Args:
        logs: one engine on one hardware.
        features: of `sim.latency.regression`; "step" among them.
        start: first guess, nanoseconds per unit; what is missing is guessed from the log.

    Raises:
        InputError: fewer than MIN_REQUESTS usable requests with times.
    """
    known = sum(log.num_known for log in logs)
    if known < MIN_REQUESTS:
        problem = f"{known} requests with a first-token time: at least {MIN_REQUESTS} are needed; record more"
        raise InputError(problem, path=place_of(logs[0].run) if logs else None)
    names = tuple(features)
    guess = {**_guess(logs), **(start or {})}
    prices = np.array([guess.get(name, 0.0) for name in names])
    path = []
    for _ in range(_ROUNDS):
        windows = _Windows.of(logs, names, prices)
        prices = prices + _STEP * (_corrected(windows) - prices)
        path.append(prices)
    prices = np.mean(path[-_AVERAGED:], axis=0)
    part = prices * windows.sums.sum(axis=0)
    prices[part < _NOTHING * part.sum()] = 0.0  # on its way to 0, which the fit reached
    windows = _Windows.of(logs, names, prices)
    sd = windows.scales()
    scaled = windows.errors / sd[windows.kind]
    sensitivity = windows.sums / (windows.simulated_ns * sd[windows.kind])[:, None]
    doubt = find_doubt(names, prices, scaled, sensitivity, 1 / np.hypot(1, scaled), windows.order, widen=_WIDENED)
    return LogFit(_latency(names, prices), names, prices, windows.errors, windows.kind, windows.order, sd, doubt)


def _corrected(windows: _Windows) -> FloatArray:
    """Prices that turn the windows' sums into the measured times."""
    from scipy.optimize import nnls

    sd = windows.scales()[windows.kind]
    weight = (1 + (windows.errors / sd) ** 2) ** -0.25 / (sd * windows.simulated_ns)
    size = windows.sums.max(axis=0, initial=0.0)
    size[size == 0] = 1.0
    rows = np.column_stack([windows.sums / size, windows.measured_ns]) * weight[:, None]
    triangle = np.linalg.qr(rows).R
    found: FloatArray = nnls(triangle[:, :-1], triangle[:, -1])[0] / size
    return found


def _scale(errors: FloatArray) -> float:
    """1.4826 times the median distance from the median, never so small that rounding decides."""
    if not len(errors):
        return _FIRST_SD
    return max(1.4826 * float(np.median(np.abs(errors - np.median(errors)))), _LEAST_SD)


def _guess(logs: Sequence[Log]) -> dict[str, float]:
    """Where to begin: a step costs what most tokens took, a prompt token what the quickest first tokens took."""
    times = np.concatenate([log.times(log.run)[:, log.rows] for log in logs], axis=1)
    inputs, outputs = (
        np.concatenate([log.run.requests.column(name).to_numpy()[log.rows] for log in logs])
        for name in ("input_tokens", "output_tokens")
    )
    per_prompt_token = float(np.nanquantile(times[0] / inputs, 0.25))
    decoded = np.isfinite(times[1])
    step = np.median(times[1, decoded] / (outputs[decoded] - 1)) if decoded.any() else np.nanmin(times[0])
    return {"step": float(step), "prefill_tokens": per_prompt_token}


# ---- choice, judgement, profile ------------------------------------------------------------------------------


def stages(num_logs: int) -> tuple[str, ...]:
    """What `calibrate_logs` tells its `progress`, in order."""
    held_out = [f"held out: {part}" for part in (range(1, num_logs + 1) if num_logs > 1 else ["later half"])]
    return (*(f"model: {name}" for name in GROWTH), *held_out, "all requests")


def calibrate_logs(logs: Sequence[Log], *, progress: Progress | None = None) -> Profile:
    """A step-latency profile from request logs alone.

    **Choice of the model.** The nested models of GROWTH are fitted to the part that is used for fitting, and the
    simplest wins whose mean loss is within one standard error of the best (Breiman et al. 1984, section 3.4.3), the
    error taken from blocks of neighbouring requests.

    **Judgement.** Of several logs each is left out in turn and simulated with the others' prices. Of a single log,
    prices are fitted to the times of the earlier half of the requests and judged on the later half: the later
    requests' arrivals and lengths are part of the load in both, their times are not looked at.

    Args:
        logs: of one engine on one hardware.
        progress: called with each of `stages(len(logs))` when it begins.

    Raises:
        InputError: too few requests with times, or logs of different engines, hardware or models.
    """
    tell = progress or (lambda _: None)
    facts = agreed_facts([log.run for log in logs])
    first = [logs[0].halves()[0]] if len(logs) == 1 else list(logs)
    fits = _grown(first, tell)
    chosen = _choose(fits)
    features, start = fits[chosen].features, dict(zip(fits[chosen].features, fits[chosen].prices_ns, strict=True))
    accuracy = _held_out(logs, fits[chosen], tell)
    tell("all requests")
    host, frontend_note = fit_frontend([log.run for log in logs], HostTime())
    fit = fit_logs(logs, features, start)
    batches = BatchStats(
        np.concatenate([BatchStats.of_steps(simulate(log.run, log.config, fit.latency).steps).table for log in logs])
    )
    return Profile(
        kind="regression",
        latency=fit.latency.to_json(),
        host=host,
        **facts,
        domain={name: (float(getattr(batches, name).min()), float(getattr(batches, name).max())) for name in COLUMNS},
        accuracy=accuracy,
        provenance={
            "method": "request logs: prices for which simulated first-token and decode times are the measured ones",
            "runs": [_evidence(log, index) for index, log in enumerate(logs)],
            "held_out": "whole logs in turn" if len(logs) > 1 else "the later half of the requests, by arrival",
            "features": chosen,
            "features_tried": {name: {"loss": float(loss.mean())} for name, loss in _losses(fits).items()},
            "doubt": fit.doubt.to_json(),
            "host_time": "none: a log cannot tell it from the fixed cost of a step, which holds it",
            "frontend_time": frontend_note,
            "kvtwin": version("kvtwin"),
        },
    )


def _grown(logs: Sequence[Log], tell: Progress) -> dict[str, LogFit]:
    """A fit of each nested model, each starting from the one before."""
    fits: dict[str, LogFit] = {}
    features: tuple[str, ...] = ()
    start: dict[str, float] = {}
    for name, more in GROWTH.items():
        tell(f"model: {name}")
        features += more
        fits[name] = fit_logs(logs, features, start)
        start = dict(zip(features, fits[name].prices_ns.tolist(), strict=True))
    return fits


def _losses(fits: Mapping[str, LogFit]) -> dict[str, FloatArray]:
    """Loss of each used time under each model, on one scale: the smallest that any model reaches."""
    sd = np.min([fit.sd for fit in fits.values()], axis=0)
    return {name: 2 * (np.hypot(1, fit.errors / sd[fit.kind]) - 1) for name, fit in fits.items()}


def _choose(fits: Mapping[str, LogFit]) -> str:
    """The simplest model within one standard error of the best."""
    losses = _losses(fits)
    best = min(losses, key=lambda name: float(losses[name].mean()))
    order = np.argsort(fits[best].order, kind="stable")
    for name, loss in losses.items():
        excess = (loss - losses[best])[order]
        if name == best or excess.mean() <= stats.standard_error(excess):
            return name
    raise AssertionError("the best model is one of them")


def _held_out(logs: Sequence[Log], chosen: LogFit, tell: Progress) -> dict[str, Any]:
    """Errors of TTFT, TPOT and latency on requests whose times no price has seen."""
    found = _judged(logs, chosen, tell)
    accuracy = {name: _summary(times[0], times[1]) for name, times in _joined(found).items()}
    if len(logs) > 1:
        for index, (log, one) in enumerate(zip(logs, found, strict=True)):
            accuracy |= {f"{name} of {_name(log, index)}": _summary(times[0], times[1]) for name, times in one.items()}
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


def _name(log: Log, index: int) -> str:
    place = place_of(log.run)
    return Path(place).name if place else f"log {index + 1}"


def _evidence(log: Log, index: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in ("arrival_ns", "input_tokens", "output_tokens", log.clock, "first_token_ns", "finish_ns"):
        digest.update(np.nan_to_num(_floats(log.run, name), nan=-1.0).astype("<i8").tobytes())
    return {
        "name": _name(log, index),
        "requests": log.num_known,
        "clock": log.clock.removesuffix("_ns"),
        "sha256": digest.hexdigest(),
    }
