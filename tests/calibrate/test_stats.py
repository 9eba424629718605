"""Error measures and influences against closed forms, and the intervals against truths that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.calibrate import stats
from kvtwin.calibrate.blocks import block_length
from kvtwin.calibrate.dependence import correlation_of_neighbours, slow_correlation, variance_of_mean


def ar1(rng: np.random.Generator, rho: float, rows: int, n: int) -> stats.FloatArray:
    """Rows of a standard normal AR(1) process: x_i = rho x_(i-1) + sqrt(1 - rho^2) noise."""
    x = rng.standard_normal((rows, n))
    for i in range(1, n):
        x[:, i] = rho * x[:, i - 1] + np.sqrt(1 - rho**2) * x[:, i]
    return x


MEASURED = np.array([100.0, 200.0, 400.0])
SIMULATED = np.array([110.0, 180.0, 400.0])


def test_error_measures_by_hand() -> None:
    assert stats.relative_errors(MEASURED, SIMULATED) == pytest.approx([0.1, -0.1, 0.0])
    assert stats.mape(MEASURED, SIMULATED) == pytest.approx(0.2 / 3)
    assert stats.ratio_of_sums(SIMULATED, MEASURED).value == pytest.approx(690 / 700 - 1)
    assert stats.quantile_ratio(MEASURED, SIMULATED, 0.5).value == pytest.approx(-0.1)
    assert stats.quantile(MEASURED, 0.9).value == np.quantile(MEASURED, 0.9)


def test_errors_are_relative_to_the_measurement_not_to_the_prediction() -> None:
    one, two = np.array([100.0]), np.array([50.0])
    assert stats.mape(one, two) == 0.5
    assert stats.mape(two, one) == 1.0


def test_no_relative_error_without_a_positive_measurement() -> None:
    assert np.isnan(stats.relative_error(0.0, 1.0))
    assert np.isnan(stats.relative_errors(np.array([0.0, 2.0]), np.array([1.0, 2.0]))).tolist() == [True, False]


# ---- influences: how the level moves when a row counts a little more ------------------------------------------


@given(st.integers(2, 40), st.integers(0, 10**6))
def test_the_influence_of_sums_is_their_derivative(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top, bottom, rows = rng.lognormal(size=n), rng.lognormal(size=n), rng.random(n) < 0.5
    rows[0] = True

    def level_of(weight: stats.FloatArray, which: str) -> float:
        if which == "ratio":
            return float(weight @ top / (weight @ bottom))
        kept = weight * (rows if which == "some" else 1)
        return float(kept @ top / kept.sum())

    found = {"ratio": stats.ratio_of_sums(top, bottom), "all": stats.mean(top), "some": stats.mean(top, rows)}
    for which, statistic in found.items():
        assert statistic.level == pytest.approx(level_of(np.ones(n), which))
        step = 1e-6
        for row in (0, n - 1):
            heavier = np.ones(n)
            heavier[row] += step
            slope = (np.log(level_of(heavier, which)) - np.log(statistic.level)) / step * n
            assert statistic.influence[row] == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_the_influence_of_a_quantile_is_what_leaving_a_row_out_does(q: float) -> None:
    """The jackknife (Efron & Stein 1981): (n - 1) (T - T_without) tends to the influence."""
    rng = np.random.default_rng(1)
    values = rng.lognormal(size=4000)
    statistic = stats.quantile(values, q)
    n = len(values)
    assert statistic.influence.mean() == pytest.approx(0, abs=1e-9)
    # In the tail the variance is taken in a wider window; compare the two spreads.
    without = []
    for row in range(0, n, 40):
        left = np.delete(values, row)
        without.append((n - 1) * (np.log(statistic.level) - np.log(stats.quantile(left, q).level)))
    jackknife = np.array(without) - np.mean(without)
    ours = statistic.influence[::40] * np.sqrt(statistic.spread)
    assert np.corrcoef(jackknife, ours)[0, 1] > 0.98
    assert np.std(ours) == pytest.approx(np.std(jackknife), rel=0.1)


def test_the_variance_of_a_median_is_that_of_its_formula() -> None:
    # Var(median) = 1 / (4 n f^2), f the density there: 1 / sqrt(2 pi) for log X standard normal, on the scale of log.
    values = np.random.default_rng(0).lognormal(size=100_000)
    median = stats.quantile(values, 0.5)
    variance = median.scaled(variance_of_mean(median.influence, independent=True)).variance
    assert variance == pytest.approx(np.pi / 2 / 100_000, rel=0.05)


# ---- rows that depend on one another --------------------------------------------------------------------------


def test_independent_rows_have_the_usual_variance() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = variance_of_mean(values, independent=True)
    assert found.variance == pytest.approx(values.var(ddof=1) / 50)
    assert found.dof == pytest.approx(49)
    assert found.rows == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_variance_of_ar1_is_its_closed_form(rho: float) -> None:
    """Var(mean) = (1 + rho) / (1 - rho) / n for unit variance, and as many independent rows as that says."""
    found = [variance_of_mean(x) for x in ar1(np.random.default_rng(0), rho, 40, 5000)]
    inflation = (1 + rho) / (1 - rho)
    assert np.mean([one.variance for one in found]) * 5000 == pytest.approx(inflation, rel=0.12)
    assert np.median([one.rows for one in found]) == pytest.approx(5000 / inflation, rel=0.15)


def test_few_heavy_rows_leave_few_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    even, spiky = rng.normal(size=2000), np.zeros(2000)
    spiky[[300, 301, 302]] = 1.0
    assert variance_of_mean(even).dof > 8
    assert variance_of_mean(spiky).dof < 3


def test_the_skewness_of_a_mean_is_its_closed_form() -> None:
    """A mean of n exponential rows has the skewness 2 / sqrt(n), whether or not neighbours may depend."""
    rows = np.random.default_rng(0).exponential(size=(40, 4000))
    for independent in (True, False):
        found = np.median([variance_of_mean(x, independent=independent).skewness for x in rows])
        assert found == pytest.approx(2 / np.sqrt(4000), rel=0.2)
    assert variance_of_mean(-rows[0]).skewness == pytest.approx(-variance_of_mean(rows[0]).skewness)


def test_slow_parts_that_move_together_or_not() -> None:
    rng = np.random.default_rng(0)
    drift, noise = np.cumsum(rng.normal(size=1000)), rng.normal(size=1000)
    assert slow_correlation(drift, 2 * drift + 1) == pytest.approx(1)
    assert slow_correlation(drift, 0.01 * noise - drift) == pytest.approx(-1, abs=1e-3)
    strangers = [slow_correlation(*rng.normal(size=(2, 1000))) for _ in range(100)]
    assert abs(np.mean(strangers)) < 0.1
    assert slow_correlation(drift, np.ones(1000)) == 0
    assert slow_correlation(np.zeros(5), np.ones(5)) == 0


def test_an_interval_is_longer_towards_busier_runs_where_errors_hang_on_the_load() -> None:
    """Errors that grow with a wait of long memory; then the same rows in any order; then no sizes at all."""
    rng = np.random.default_rng(0)
    wait = np.exp(ar1(rng, 0.97, 1, 800)[0])
    slower = wait * (1 + 0.1 * wait)
    hanging = replace(stats.ratio_of_sums(slower, wait), load=stats.Load(wait, slower))
    below, above = hanging.stretch()
    assert below == 1 and 2 < above <= 3
    turned = replace(stats.ratio_of_sums(wait, slower), load=stats.Load(slower, wait)).stretch()
    assert turned == pytest.approx((above, 1), rel=0.2)
    plain = stats.ratio_of_sums(slower, wait)
    assert plain.stretch() == (1, 1)
    low, high = stats.interval(plain) or (0.0, 0.0)
    longer = stats.interval(hanging)
    assert longer is not None and longer[0] == low and longer[1] > high
    mixed = rng.permutation(800)
    load = stats.Load(wait[mixed], slower[mixed])
    assert max(replace(stats.ratio_of_sums(slower[mixed], wait[mixed]), load=load).stretch()) < 1.5


def test_the_noise_of_one_side_is_no_load() -> None:
    """The twin is the recording with noise of its own, of long memory: where it is slow, it is wrong, and no load is."""
    rng = np.random.default_rng(0)
    wait = rng.lognormal(size=800)
    twin = wait * np.exp(ar1(rng, 0.97, 1, 800)[0])
    found = replace(stats.ratio_of_sums(twin, wait), load=stats.Load(wait, twin)).stretch()
    assert max(found) < 1.2
    assert max(replace(stats.ratio_of_sums(twin, wait), load=stats.Load(twin, twin)).stretch()) > 2


def test_a_longer_side_does_not_turn_an_error_round() -> None:
    """Every request 0.3 later: the error is smaller where waits are longer, but never an error the other way."""
    wait = 1 + np.exp(ar1(np.random.default_rng(2), 0.9, 1, 200)[0])
    late = replace(stats.ratio_of_sums(wait + 0.3, wait), load=stats.Load(wait, wait + 0.3))
    below, above = late.stretch()
    assert below > 2 and above == 1
    found = stats.interval(late)
    longer = stats.around(late.level, late.variance, late.value, True, late.stretch())
    assert found is not None and longer is not None and longer[0] < 0 < found[0]


def test_what_all_errors_share_is_not_lost_under_the_rows_own_sizes() -> None:
    """Sizes of every length, and a slow error of 10 % over all: the quantile is off by that too, not by its rows alone."""
    rng = np.random.default_rng(3)
    size = rng.lognormal(0, 1.5, 300)
    twin = size * np.exp(0.1 * ar1(rng, 0.97, 1, 300)[0] + 0.01 * rng.normal(size=300))
    ratios = np.log(twin / size)
    for q in (0.5, 0.9, 0.99):
        found = stats.quantile_ratio(size, twin, q)
        assert found.variance.variance >= variance_of_mean(ratios).variance / 2
    mean = stats.ratio_of_sums(twin, size)
    assert stats.or_shared(mean, size, twin).variance.variance >= mean.variance.variance
    # Nothing shared: a quantile varies by the rows around it.
    alone = size * np.exp(0.01 * rng.normal(size=300))
    assert stats.quantile_ratio(size, alone, 0.9).variance.variance > variance_of_mean(np.log(alone / size)).variance
    gone = np.where(np.arange(300) < 290, 0.0, size)  # no pair of two positive times but ten
    assert stats.or_shared(stats.ratio_of_sums(gone, gone + 0.1), gone, gone + 0.1).level > 0


def test_the_side_of_a_tail_that_a_sample_may_lack_is_longer() -> None:
    """Of 50 rows none may lie beyond p99; of 5,000 fifty do; and no row is missing at the bottom."""
    rng = np.random.default_rng(0)
    few, many = (stats.quantile(rng.lognormal(size=n), 0.99).stretch() for n in (50, 5000))
    assert few[0] == many[0] == 1 and many[1] < 1.1 and 1.4 < few[1] <= 2
    assert stats.quantile(rng.lognormal(size=50), 0.5).stretch() == (1, 1)


def test_a_mean_that_few_rows_carry_reaches_further_up() -> None:
    """Log-normal rows, 20 of them, truth exp(1/2): symmetric intervals miss below in 7 %, of nominal 2.5 %."""
    truth, missed = np.exp(0.5), {"below": 0, "above": 0}
    for case in range(600):
        found = stats.interval(stats.mean(np.random.default_rng([4, case]).lognormal(size=20)), independent=True)
        assert found is not None
        missed["below"] += found[1] < truth
        missed["above"] += found[0] > truth
    assert 0.01 * 600 <= missed["above"] <= 0.05 * 600
    assert missed["below"] <= 0.05 * 600


def test_rows_that_differ_by_roundings_have_a_variance() -> None:
    tiny = 1e-106 * np.random.default_rng(5).standard_normal(400)  # its square is no float any more
    assert variance_of_mean(tiny).dof == pytest.approx(variance_of_mean(1e106 * tiny).dof)


def test_the_edges_of_a_variance() -> None:
    assert variance_of_mean(np.ones(9)).variance == 0
    assert variance_of_mean(np.array([1.0])).variance == np.inf
    assert variance_of_mean(np.array([1.0, 3.0])).variance == pytest.approx(1.0)
    assert correlation_of_neighbours(np.ones(4)) == 0
    assert correlation_of_neighbours(np.tile([1.0, -1.0], 50)) == pytest.approx(-0.99)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_any_sizes_have_an_interval_or_none(sizes: list[float], q: float) -> None:
    values = np.array(sizes)
    for statistic in (stats.mean(values), stats.quantile(values, q), stats.ratio_of_sums(values, values[::-1])):
        found = stats.interval(statistic)
        if found is not None:
            assert found[0] <= statistic.value <= found[1]
            assert found[0] >= -statistic.is_error
        assert stats.describe(statistic, "rows")


def test_equal_runs_have_no_doubt() -> None:
    values = np.random.default_rng(0).lognormal(size=30)
    assert stats.interval(stats.ratio_of_sums(values, values)) == (0.0, 0.0)
    assert stats.interval(stats.quantile_ratio(values, values, 0.9)) == (0.0, 0.0)
    assert stats.interval(stats.mean(np.zeros(30))) == (0.0, 0.0)


def test_too_little_says_nothing() -> None:
    four = np.array([1.0, 2.0, 3.0, 4.0])
    assert stats.interval(stats.mean(four)) is None
    assert stats.interval(stats.ratio_of_sums(np.ones(10), np.zeros(10))) is None
    assert stats.interval(stats.mean(np.ones(10), np.arange(10) < 4)) is None
    assert stats.ratio_interval(stats.mean(four), stats.mean(np.ones(10))) is None
    assert stats.ratio_interval(stats.mean(np.zeros(10)), stats.mean(np.ones(10))) is None
    wild = np.array([1e-300] * 9 + [1e300])
    assert stats.interval(stats.ratio_of_sums(wild, wild[::-1])) is None


def test_a_short_sample_is_called_short() -> None:
    x = np.exp(ar1(np.random.default_rng(0), 0.9, 1, 100)[0])
    assert "may be too narrow" in stats.describe(stats.mean(x), "steps")
    y = np.random.default_rng(0).lognormal(size=1000)
    told = stats.describe(stats.mean(y), "steps")
    assert told.startswith("1000 steps, as good as ") and "narrow" not in told
    some = stats.describe(stats.mean(y, np.arange(1000) < 50), "steps")  # rows it does not rest on tell nothing
    assert 1 <= int(some.removeprefix("50 steps, as good as ").split()[0]) <= 50


# ---- what the intervals cover; many more cases in tests/fidelity/test_coverage.py --------------------------------


def share_that_holds(make: Callable[[np.random.Generator], stats.Interval | None], truth: float, cases: int) -> float:
    found = [make(np.random.default_rng([1, case])) for case in range(cases)]
    return float(np.mean([one is not None and one[0] <= truth <= one[1] for one in found]))


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_the_intervals_cover_a_known_truth(rho: float) -> None:
    """300 pairs of log-normal AR(1) latencies; truth in closed form; nominal 95 %, 2.5 standard errors are 3.1 %."""
    spread = np.hypot(0.5, 0.2)
    truth: dict[str | float, float] = {
        "mean": np.exp(0.05 + (spread**2 - 0.36) / 2) - 1,
        0.5: np.exp(0.05) - 1,
        0.9: np.exp(0.05 + 1.2815515655446004 * (spread - 0.6)) - 1,
    }
    for statistic, expected in truth.items():

        def found(rng: np.random.Generator, statistic: str | float = statistic) -> stats.Interval | None:
            common, own = ar1(rng, rho, 2, 300)
            measured, simulated = np.exp(0.6 * common), np.exp(0.5 * common + 0.2 * own + 0.05)
            if isinstance(statistic, str):
                return stats.interval(stats.ratio_of_sums(simulated, measured))
            return stats.interval(stats.quantile_ratio(measured, simulated, statistic))

        assert 0.915 <= share_that_holds(found, expected, 300) <= 0.99, (statistic, rho)


def test_two_samples_of_their_own() -> None:
    def found(rng: np.random.Generator) -> stats.Interval | None:
        one, two = rng.lognormal(0, 0.5, 200), rng.lognormal(0.1, 0.5, 80)
        return stats.ratio_interval(stats.quantile(one, 0.5), stats.quantile(two, 0.5))

    assert 0.915 <= share_that_holds(found, np.exp(0.1) - 1, 300) <= 0.985


def test_nothing_is_drawn() -> None:
    values = np.random.default_rng(0).lognormal(size=50)
    assert stats.interval(stats.mean(values)) == stats.interval(stats.mean(values.copy()))


# ---- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_block_length_of_ar1_is_near_its_closed_form(rho: float) -> None:
    # R(k) = rho^k: G = 2 rho / (1 - rho)^2, g(0) = (1 + rho) / (1 - rho), b = (1.5 G^2 / g(0)^2 n)^(1/3).
    n = 20_000
    best = (1.5 * (2 * rho / (1 - rho) ** 2) ** 2 / ((1 + rho) / (1 - rho)) ** 2 * n) ** (1 / 3)
    series = ar1(np.random.default_rng(0), rho, 1, n)[0]
    assert block_length(series) == pytest.approx(4 * best, rel=0.25)


def test_block_length_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    assert block_length(np.ones(100)) == 1
    assert block_length(np.array([1.0])) == 1
    assert block_length(np.arange(200.0)) == 40  # a trend: the longest that leaves five blocks
    assert block_length(rng.standard_normal(5000)) == 18  # independent: the cube root of n
    assert block_length(np.tile([1.0, -1.0], 100)) >= 1
