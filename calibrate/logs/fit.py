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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.agree import place_of
from kvtwin.calibrate.identify import Doubt, find_doubt
from kvtwin.calibrate.logs.log import Log, floats
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.regression import RegressionLatency, design
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError

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
        np.column_stack([np.interp(floats(twin, name), edges, part) for part in done.T])
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
