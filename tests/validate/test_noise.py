"""What the noise floor covers, on recordings whose truth is known, and on our own recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvtwin.calibrate import noise, stats
from kvtwin.traces.run import Run


def test_floors_by_hand() -> None:
    assert noise.rms_floor([100.0, 110.0]) == pytest.approx(np.sqrt((0.1**2 + (1 / 11) ** 2) / 2))
    assert noise.rms_floor([5.0, 5.0, 5.0]) == 0.0
    columns = [np.array([100.0, 200.0, np.nan]), np.array([110.0, 100.0, 3.0])]
    assert noise.paired_floor(columns) == pytest.approx(((0.1 + 0.5) / 2 + (1 / 11 + 1.0) / 2) / 2)


def test_no_floor_without_repeats() -> None:
    assert noise.rms_floor([]) is None
    assert noise.rms_floor([1.0]) is None
    assert noise.rms_floor([float("nan"), 1.0]) is None
    assert noise.paired_floor([np.ones(3)]) is None
    assert noise.paired_floor([np.full(2, np.nan), np.ones(2)]) is None
    assert noise.step_floor([]) is None


@pytest.mark.parametrize(("repeats", "perfect", "another"), [(2, 0.65, 0.50), (3, 0.76, 0.58), (4, 0.79, 0.61)])
def test_what_the_floor_covers(repeats: int, perfect: float, another: float) -> None:
    """Recordings are normal about 1 with s = 3 %; the figures of the module's docstring within 4 standard errors."""
    rng, trials = np.random.default_rng(0), 4000
    recordings = 1 + 0.03 * rng.standard_normal((trials, repeats))
    next_one = 1 + 0.03 * rng.standard_normal(trials)
    floors = np.array([noise.rms_floor(list(row)) for row in recordings], float)
    measured = recordings[:, 0]
    error = 4 * np.sqrt(0.25 / trials) + 0.005  # the figures are rounded to a percent
    assert np.mean(np.abs(1 / measured - 1) <= floors) == pytest.approx(perfect, abs=error)
    assert np.mean(np.abs(next_one / measured - 1) <= floors) == pytest.approx(another, abs=error)
    # Its square is without bias: 2 s^2. The spread of a mean of chi-squares with K - 1 degrees of freedom bounds it.
    expected = 2 * 0.03**2
    spread = expected * np.sqrt(2 / (repeats - 1) / trials)
    assert np.mean(floors**2) == pytest.approx(expected, abs=4 * spread + 0.01 * expected)


def test_alike_steps_are_matched_and_the_others_left_out(
    make_run: Callable[..., Run], make_steps: Callable[..., dict[str, Any]]
) -> None:
    one = make_steps([[(0, 8)], [(100, 1)], [(1000, 1)], [(200, 1), (300, 1)], [(5000, 1)]], [80, 100, 1000, 200, 7])
    other = make_steps([[(110, 1)], [(1040, 1)], [(900, 1)], [(0, 9)], [(0, 8)]], [110, 1300, 9, 9, 88])
    runs = [make_run([1.0] * 2, [2.0] * 2, steps=steps) for steps in (one, other)]
    floor = noise.step_floor(runs)
    assert floor is not None
    # The prefill of 8 tokens, the decodes at 100 and 110, at 1000 and 1040; 900 is further than 5 % from 1000.
    assert floor.num_pairs == 6
    assert floor.matched == pytest.approx(6 / 10)
    there, back = (0.1 + 0.1 + 0.3) / 3, (1 - 100 / 110 + 1 - 80 / 88 + 1 - 1000 / 1300) / 3
    assert floor.metrics["step_mape"] == pytest.approx((there + back) / 2)
    bias = (110 + 1300 + 88) / 1180 - 1, 1180 / (110 + 1300 + 88) - 1
    assert floor.metrics["step_bias"] == pytest.approx(np.sqrt(np.mean(np.square(bias))))
    assert floor.drift == pytest.approx(1.1)
    assert "step_mape_prefill" not in floor.metrics  # one step is no floor of a regime


def test_a_floor_by_regime_needs_ten_steps(
    make_run: Callable[..., Run], make_steps: Callable[..., dict[str, Any]]
) -> None:
    batches = [[(100 * i, 1)] for i in range(10)] + [[(0, 5)], [(10, 1), (0, 7)]]
    runs = [make_run([1.0] * 2, [2.0] * 2, steps=make_steps(batches, [scale] * len(batches))) for scale in (100, 125)]
    floor = noise.step_floor(runs)
    assert floor is not None
    assert floor.matched == 1.0
    assert floor.metrics["step_mape_decode"] == pytest.approx((0.25 + 0.2) / 2)
    assert {"step_mape_prefill", "step_mape_mixed"}.isdisjoint(floor.metrics)


def test_matching_equals_the_search_by_hand() -> None:
    rng = np.random.default_rng(0)

    def side(n: int) -> noise._Side:
        shape = np.column_stack([rng.integers(0, 3, n), rng.integers(0, 2, n), rng.integers(0, 2, n)])
        return noise._Side(shape, rng.integers(0, 2000, n), np.ones(n), np.full(n, "decode"))

    one, other = side(80), side(60)
    rows, alike = noise._nearest(one, other)
    for i in range(80):
        gaps = [
            abs(int(other.context[j] - one.context[i])) for j in range(60) if (other.shape[j] == one.shape[i]).all()
        ]
        limit = max(0.05 * one.context[i], 32)
        assert alike[i] == (bool(gaps) and min(gaps) <= limit)
        if alike[i]:
            assert abs(other.context[rows[i]] - one.context[i]) == min(gaps)
            assert (other.shape[rows[i]] == one.shape[i]).all()


def test_no_batches_alike_no_floor(make_run: Callable[..., Run], make_steps: Callable[..., dict[str, Any]]) -> None:
    runs = [make_run([1.0], [2.0], steps=make_steps([[(0, size)]], [10])) for size in (5, 6)]
    assert noise.step_floor(runs) is None


def test_a_floor_of_recordings_that_differ_by_a_factor_is_that_factor() -> None:
    columns = [np.array([10.0, 20.0]), np.array([15.0, 30.0])]
    assert noise.paired_floor(columns) == pytest.approx((0.5 + 1 / 3) / 2)
    assert stats.mape(*columns) == pytest.approx(0.5)
