"""Intervals of throughput where the truth is known: one server, the twin 4 % slower."""

from __future__ import annotations

import numpy as np
import pytest

from kvtwin.calibrate.stats import FloatArray
from kvtwin.validate.throughput import lag_interval


def served(arrival: FloatArray, service: FloatArray) -> FloatArray:
    """When each is finished, first come, first served."""
    done = np.cumsum(service)
    finish: FloatArray = done + np.maximum.accumulate(arrival - (done - service))
    return finish


def two_runs(seed: int, n: int, load: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    rng = np.random.default_rng([seed, n])
    arrival, work = np.cumsum(rng.exponential(1 / load, n)), rng.lognormal(-0.125, 0.5, n)
    sides = [served(arrival, work * scale * rng.lognormal(-0.005, 0.1, n)) for scale in (1.0, 1.04)]
    return arrival, sides[0], sides[1]


def test_service_in_order_by_hand() -> None:
    assert served(np.array([0.0, 1.0, 9.0]), np.array([3.0, 3.0, 1.0])).tolist() == [3.0, 6.0, 10.0]


@pytest.mark.parametrize(("load", "truth"), [(0.6, 0.0), (1.5, 1 / 1.04 - 1)])
def test_the_interval_holds_the_truth(load: float, truth: float) -> None:
    """Below saturation both generate what arrives; above it the slower twin generates less; nominal 95 %."""
    found = [lag_interval(*two_runs(seed, 300, load)) for seed in range(200)]
    held = [ends is not None and ends[0] <= truth <= ends[1] for ends in found]
    assert 0.90 <= np.mean(held) <= 0.995


def test_longer_runs_know_more() -> None:
    widths = []
    for n in (200, 3200):
        found = [lag_interval(*two_runs(seed, n, 1.5)) for seed in range(20)]
        widths.append(np.median([ends[1] - ends[0] for ends in found if ends is not None]))
    assert widths[1] < 0.4 * widths[0]


def test_equal_runs_and_too_few_requests() -> None:
    arrival, finish, other = two_runs(0, 50, 1.5)
    assert lag_interval(arrival, finish, finish) == (0.0, 0.0)
    assert lag_interval(arrival[:4], finish[:4], other[:4]) is None


def test_the_interval_holds_what_was_measured() -> None:
    for seed in range(30):
        arrival, finish, other = two_runs(seed, 40, 0.9)
        low, high = lag_interval(arrival, finish, other) or (np.nan, np.nan)
        assert low <= (finish.max() - arrival[0]) / (other.max() - arrival[0]) - 1 <= high
