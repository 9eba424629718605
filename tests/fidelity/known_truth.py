"""Recordings and twins whose true error is known, for the study of what intervals cover.

A maker takes a generator of random numbers and a number of requests, and returns a recording and its twin, which share
arrivals and work and have noise of their own. The truth is what an endless recording of that traffic would show.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.stats import FloatArray
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.result import PREDICTIONS

Pair = tuple[Run, Run]
Maker = Callable[[np.random.Generator, int], Pair]

# Requests before the recording begins: a system that runs. An engine's batch holds those that come after it, too.
WARM = 3000
AROUND_ENGINE = 300


def ar1(rng: np.random.Generator, n: int, rho: float, sd: float) -> FloatArray:
    from scipy.signal import lfilter

    noise = rng.normal(size=n) * np.sqrt(1 - rho**2)
    noise[0] = rng.normal()
    found: FloatArray = sd * lfilter([1], [1, -rho], noise)
    return found


def run_of(arrival_s: FloatArray, ttft_s: FloatArray, tpot_s: FloatArray, tokens: npt.NDArray[np.int64]) -> Run:
    queued = (arrival_s * 1e9).astype(np.int64)
    first = queued + (ttft_s * 1e9).astype(np.int64)
    columns = {
        "request_id": [str(row) for row in range(len(queued))],
        "arrival_ns": queued,
        "input_tokens": np.full(len(queued), 100),
        "output_tokens": tokens,
        "queued_ns": queued,
        "first_token_ns": first,
        "finish_ns": first + (tpot_s * (tokens - 1) * 1e9).astype(np.int64),
    }
    return Run(RunInfo(kind="recorded"), {"requests": from_columns("requests", columns, "test")})


# ---- noise on times --------------------------------------------------------------------------------------------


Draw = Callable[[np.random.Generator, int], FloatArray]


def planted(factor: float, times: Draw, errors: Draw) -> Maker:
    """The twin's times are the recorded ones, times a factor, times errors whose mean is 1; nothing hangs together."""

    def make(rng: np.random.Generator, n: int) -> Pair:
        arrival, tokens = np.cumsum(rng.exponential(0.1, n)), rng.integers(20, 200, n)
        ttft, tpot = 0.2 * times(rng, n), 0.02 * np.sqrt(times(rng, n))
        twin = (factor * ttft * errors(rng, n), factor * tpot * errors(rng, n))
        return run_of(arrival, ttft, tpot, tokens), run_of(arrival, *twin, tokens)

    return make


def correlated(rho: float) -> Maker:
    """Log-normal times whose errors hang together over neighbours; the twin is 5 % slow."""

    def make(rng: np.random.Generator, n: int) -> Pair:
        arrival, tokens = np.cumsum(rng.exponential(0.1, n)), rng.geometric(0.01, n) + 1
        size = rng.lognormal(0, 0.7, n) * np.exp(ar1(rng, n, rho, 0.3))
        slow = np.exp(ar1(rng, n, rho, 0.2))
        (ttft, tpot), (twin_ttft, twin_tpot) = (
            (0.2 * size * np.exp(ar1(rng, n, rho, 0.2)), 0.02 * slow * np.exp(ar1(rng, n, rho, 0.1))) for _ in "ms"
        )
        return run_of(arrival, ttft, tpot, tokens), run_of(arrival, 1.05 * twin_ttft, 1.05 * twin_tpot, tokens)

    return make


def heavy_tails(rng: np.random.Generator, n: int) -> Pair:
    """Pareto times with three moments, errors with a memory; the twin is 2 % fast."""
    arrival, tokens = np.cumsum(rng.exponential(0.1, n)), rng.geometric(0.01, n) + 1
    ttft, tpot = 0.1 * (1 + rng.pareto(3.0, n)), 0.02 * np.exp(ar1(rng, n, 0.3, 0.3))
    errors = [0.98 * np.exp(ar1(rng, n, 0.7, spread)) for spread in (0.15, 0.05)]
    return run_of(arrival, ttft, tpot, tokens), run_of(arrival, ttft * errors[0], tpot * errors[1], tokens)


# ---- queues ----------------------------------------------------------------------------------------------------


def one_server(arrival: FloatArray, service: FloatArray) -> FloatArray:
    """When each request is begun, first come, first served: Lindley's recursion in closed form."""
    done = np.cumsum(service)
    begun: FloatArray = done - service + np.maximum.accumulate(arrival - (done - service))
    return begun


def several_servers(num: int) -> Callable[[FloatArray, FloatArray], FloatArray]:
    def begun(arrival: FloatArray, service: FloatArray) -> FloatArray:
        free, start = [0.0] * num, np.empty(len(arrival))
        for row, (at, work) in enumerate(zip(arrival.tolist(), service.tolist(), strict=True)):
            start[row] = max(free[0], at)
            heapq.heapreplace(free, start[row] + work)
        return start

    return begun


def queueing(
    load: float,
    *,
    slower: float = 1.03,
    spread: float = 0.5,
    noise: float = 0.1,
    bursts: bool = False,
    warm: int = 0,
    num_servers: int = 1,
) -> Maker:
    """Late requests make the next ones late. Work is log-normal; both sides' servers have noise with a memory.

    Args:
        load: of all servers.
        slower: the twin's service times, relative.
        spread: of the logarithm of the work.
        noise: of each side's service times.
        bursts: requests come four times as fast in every other phase of 40 requests on average.
        warm: requests before the recording.
        num_servers: first come, first served by whoever is free.
    """
    serve = one_server if num_servers == 1 else several_servers(num_servers)

    def make(rng: np.random.Generator, n: int) -> Pair:
        m = n + warm
        gap, work = rng.exponential(1 / (load * num_servers), m), rng.lognormal(-(spread**2) / 2, spread, m)
        if bursts:
            phase = np.repeat(np.arange(m) % 2, rng.geometric(1 / 40, m))[:m]
            gap *= np.where(phase == 1, 1.6, 0.4)
        arrival, tokens = np.cumsum(gap), rng.geometric(0.01, m) + 1

        def side(scale: float) -> Run:
            service = work * scale * np.exp(ar1(rng, m, 0.5, noise) - noise**2 / 2)
            wait = serve(arrival, service) - arrival
            tpot = 0.02 * scale * np.exp(ar1(rng, m, 0.5, noise)) * (1 + 0.3 * (wait > 1))
            return run_of(arrival[warm:], (wait + service)[warm:], tpot[warm:], tokens[warm:])

        return side(1.0), side(slower)

    return make


# ---- our own engine --------------------------------------------------------------------------------------------

MODEL = LinearLatency(base_ns=6_000_000, per_new_token_ns=40_000, per_context_token_ns=60, per_req_ns=20_000)
ENGINE = VllmConfig(
    num_gpu_blocks=4000, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2048, async_scheduling=False
)


class Noisy:
    """The model, 4 % slower, with noise on every step that hangs together over its neighbours."""

    def __init__(self, rng: np.random.Generator, num_steps: int) -> None:
        self._factor = 1.04 * np.exp(ar1(rng, num_steps, 0.8, 0.1) - 0.005)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        factor = self._factor[first_step : first_step + len(batches)]
        times: IntArray = np.rint(MODEL.step_ns(batches, first_step) * factor).astype(np.int64)
        return times


def engine(rate_hz: float, *, around: int = AROUND_ENGINE) -> Maker:
    """A vLLM whose steps take 4 % longer than the profile says, and vary; the twin is the profile's simulation.

    Args:
        rate_hz: of the requests.
        around: requests before the recording, and as many after it; with 0 it begins empty and its end drains.
    """

    def make(rng: np.random.Generator, n: int) -> Pair:
        m = n + 2 * around
        columns = {
            "request_id": [str(row) for row in range(m)],
            "arrival_ns": (np.cumsum(rng.exponential(1 / rate_hz, m)) * 1e9).astype(np.int64),
            "input_tokens": np.minimum(rng.lognormal(5, 0.8, m).astype(np.int64) + 1, 1500),
            "output_tokens": np.minimum(rng.geometric(1 / 60, m), 400),
        }
        workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "test")})
        sides = [simulate(workload, ENGINE, model, record_steps=False) for model in (Noisy(rng, 400 * m), MODEL)]
        recording, twin = (Run(side.info, {"requests": side.requests.slice(around, n)}) for side in sides)
        return Run(replace(recording.info, kind="recorded"), {"requests": recording.requests}), twin

    return make


# ---- steps -----------------------------------------------------------------------------------------------------


def steps(rho: float) -> Callable[[np.random.Generator, int], pa.Table]:
    """Recorded and predicted steps: prefills come in spells and are predicted worse; errors have a memory."""

    def make(rng: np.random.Generator, n: int) -> pa.Table:
        prefill = ar1(rng, n, 0.9, 1.0) > 1
        batch = np.exp(ar1(rng, n, 0.99, 0.3))
        true_ns = np.where(prefill, 3e7, 8e6) * batch
        error = np.where(prefill, 0.1, 0.04) * ar1(rng, n, rho, 1.0)
        measured = true_ns * np.exp(error + 0.02 * rng.standard_t(4, n))
        columns = {
            "step": np.arange(n),
            "start_ns": np.cumsum(measured).astype(np.int64),
            "measured_ns": measured.astype(np.int64),
            "predicted_ns": (1.03 * true_ns).astype(np.int64),
            "regime": np.where(prefill, "prefill", "decode"),
            "num_reqs": np.full(n, 8),
            "num_tokens": np.where(prefill, 512, 8),
            "context_tokens": np.full(n, 1000),
            "extrapolated": np.zeros(n, np.bool_),
        }
        return pa.table(columns, schema=PREDICTIONS)

    return make


# ---- the study -------------------------------------------------------------------------------------------------

# The constants of the intervals were chosen while looking at these ...
SEEN: Mapping[str, Maker] = {
    "planted 7 %, log-normal": planted(
        1.07, lambda rng, n: rng.lognormal(0, 0.6, n), lambda rng, n: rng.lognormal(-0.005, 0.1, n)
    ),
    "independent": correlated(0.0),
    "AR(1) 0.5": correlated(0.5),
    "AR(1) 0.9": correlated(0.9),
    "queue at load 0.5": queueing(0.5),
    "queue at load 0.8": queueing(0.8),
    "engine, busy": engine(40.0),
}
# ... and none by these.
UNSEEN: Mapping[str, Maker] = {
    "planted -4 %, gamma": planted(
        0.96, lambda rng, n: rng.gamma(2, 0.5, n) + 0.05, lambda rng, n: 1 + rng.uniform(-0.2, 0.2, n)
    ),
    "heavy tails": heavy_tails,
    "engine, light": engine(10.0),
    "engine, busy, until it drains": engine(40.0, around=0),
    "heavy work, load 0.7": queueing(0.7, slower=1.04, spread=1.2, warm=WARM),
    "bursts, load 0.6": queueing(0.6, slower=1.05, bursts=True, warm=WARM),
    "4 servers, load 0.8": queueing(0.8, slower=0.96, warm=WARM, num_servers=4),
    "queue at load 0.9": queueing(0.9, slower=1.02, noise=0.05, warm=WARM),
}
# What an endless recording shows is learnt from this many requests, in as many recordings.
LONG: Mapping[str, tuple[int, int]] = {name: (60_000, 12) for name in (*SEEN, *UNSEEN) if name.startswith("engine")}
MANY = 2_000_000
