"""Do 95 % intervals hold the truth in 95 % of cases? Recordings and twins whose true error is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvtwin.calibrate import stats
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.e2e import compare_e2e
from kvtwin.validate.result import Check
from kvtwin.validate.unpaired import compare_unpaired

pytestmark = pytest.mark.fidelity

Pair = tuple[Run, Run]
LONG = 300_000  # requests that stand for the truth


def ar1(rng: np.random.Generator, n: int, rho: float, sd: float) -> stats.FloatArray:
    from scipy.signal import lfilter

    noise = rng.normal(size=n) * np.sqrt(1 - rho**2)
    noise[0] = rng.normal()
    found: stats.FloatArray = sd * lfilter([1], [1, -rho], noise)
    return found


def run_of(arrival_s: stats.FloatArray, ttft_s: stats.FloatArray, tpot_s: stats.FloatArray, tokens: np.ndarray) -> Run:
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


def correlated(rng: np.random.Generator, n: int, rho: float) -> Pair:
    """Log-normal times whose errors hang together over neighbours; the twin is 5 % slow."""
    arrival, tokens = np.cumsum(rng.exponential(0.1, n)), rng.geometric(0.01, n) + 1
    size = rng.lognormal(0, 0.7, n) * np.exp(ar1(rng, n, rho, 0.3))
    slow = np.exp(ar1(rng, n, rho, 0.2))
    sides = [(0.2 * size * np.exp(ar1(rng, n, rho, 0.2)), 0.02 * slow * np.exp(ar1(rng, n, rho, 0.1))) for _ in "ms"]
    (ttft, tpot), (twin_ttft, twin_tpot) = sides
    return run_of(arrival, ttft, tpot, tokens), run_of(arrival, 1.05 * twin_ttft, 1.05 * twin_tpot, tokens)


def queueing(rng: np.random.Generator, n: int, load: float) -> Pair:
    """One server, first come first served: late requests make the next ones late; the twin serves 3 % slower."""
    gap, work, tokens = rng.exponential(1 / load, n), rng.lognormal(-0.125, 0.5, n), rng.geometric(0.01, n) + 1

    def side(scale: float) -> Run:
        service = work * scale * np.exp(ar1(rng, n, 0.5, 0.1) - 0.005)
        # Lindley's recursion in closed form: the wait is how far the walk stands above its lowest point.
        walk = np.cumsum(np.append(0.0, service[:-1] - gap[1:]))
        wait = walk - np.minimum.accumulate(walk)
        tpot = 0.02 * scale * np.exp(ar1(rng, n, 0.5, 0.1)) * (1 + 0.3 * (wait > 1))
        return run_of(np.cumsum(gap), wait + service, tpot, tokens)

    return side(1.0), side(1.03)


MAKERS: dict[str, Callable[[np.random.Generator, int], Pair]] = {
    "independent": lambda rng, n: correlated(rng, n, 0.0),
    "AR(1) 0.5": lambda rng, n: correlated(rng, n, 0.5),
    "AR(1) 0.9": lambda rng, n: correlated(rng, n, 0.9),
    "queue at load 0.5": lambda rng, n: queueing(rng, n, 0.5),
    "queue at load 0.8": lambda rng, n: queueing(rng, n, 0.8),
}


def paired(one: Run, two: Run) -> list[Check]:
    return compare_e2e(one, two, name="x", clock="queued_ns")


@pytest.mark.parametrize("kind", MAKERS)
def test_paired_intervals_cover_the_truth(kind: str) -> None:
    """400 recordings of 100, 400 and 1,500 requests each, and their twins, metric by metric; nominal 95 %."""
    truth = {check.metric: check.error for check in paired(*MAKERS[kind](np.random.default_rng(1), LONG))}
    for n in (100, 400, 1500):
        hits: dict[str, list[bool]] = {name: [] for name in truth}
        for seed in range(400):
            for check in paired(*MAKERS[kind](np.random.default_rng([2, n, seed]), n)):
                if check.interval is not None:  # too few requests for any
                    hits[check.metric].append(check.interval[0] <= truth[check.metric] <= check.interval[1])
        covered = {name: float(np.mean(found)) for name, found in hits.items()}
        print(f"\n{kind}, {n}: " + ", ".join(f"{name} {share:.1%}" for name, share in covered.items()))
        assert min(map(len, hits.values())) > 300
        # A share of 400 has a standard error of 1.1 points. Where the queue is long, few requests hold few busy periods.
        assert min(covered.values()) > (0.7 if kind == "queue at load 0.8" else 0.9)
        assert 0.87 <= np.mean(list(covered.values())) <= 0.98


@pytest.mark.parametrize("kind", MAKERS)
def test_halves_of_one_run_raise_false_alarms_as_stated(kind: str) -> None:
    """Unpaired: the first half of 600 requests against the second; nothing to find; nominal 5 %."""
    alarms = []
    for seed in range(100):
        run, _ = MAKERS[kind](np.random.default_rng([3, seed]), 600)
        halves = [Run(RunInfo(kind="recorded"), {"requests": run.requests.slice(at, 300)}) for at in (0, 300)]
        found = compare_unpaired(*halves, name="x", clock="queued_ns")
        alarms.append([check.verdict != "not distinguishable" for check in found])
    share = float(np.mean(alarms))
    print(f"\n{kind}: {share:.1%} false alarms")
    assert share < 0.10
