"""Error measures against closed forms, and the bootstrap against truths that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.calibrate import stats
from kvtwin.calibrate.resamples import Resamples


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
    statistics = {
        690 / 700 - 1: stats.ratio_of_sums(SIMULATED, MEASURED),
        -0.1: stats.quantile_ratio(MEASURED, SIMULATED, 0.5),
    }
    for expected, statistic in statistics.items():
        assert statistic.value == pytest.approx(expected)


def test_errors_are_relative_to_the_measurement_not_to_the_prediction() -> None:
    one, two = np.array([100.0]), np.array([50.0])
    assert stats.mape(one, two) == 0.5
    assert stats.mape(two, one) == 1.0


def test_no_relative_error_without_a_positive_measurement() -> None:
    assert np.isnan(stats.relative_error(0.0, 1.0))
    assert np.isnan(stats.relative_errors(np.array([0.0, 2.0]), np.array([1.0, 2.0]))).tolist() == [True, False]


@given(st.integers(1, 60), st.data())
def test_statistics_of_a_resample_equal_those_of_the_repeated_rows(n: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, n))
    rng = np.random.default_rng(n)
    drawn = Resamples.draw(n, length, 5, rng)
    top, bottom, rows = rng.normal(size=n), rng.lognormal(size=n), rng.random(n) < 0.5
    found = [
        statistic.resampled(drawn)
        for statistic in (stats.mean(top), stats.mean(top, rows), stats.ratio_of_sums(top, bottom))
    ]
    for index, weights in enumerate(drawn.weights):
        sample = np.repeat(np.arange(n), weights.astype(int))
        kept = sample[rows[sample]]
        expected = [
            top[sample].mean(),
            top[kept].mean() if len(kept) else np.nan,
            top[sample].sum() / bottom[sample].sum() - 1,
        ]
        assert [values[index] for values in found] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("n", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_resampled_quantiles_are_the_harrell_davis_quantiles_of_scipy(n: int, q: float) -> None:
    theirs = pytest.importorskip("scipy.stats.mstats").hdquantiles
    rng = np.random.default_rng(n)
    values = rng.lognormal(size=n)
    statistic = stats.quantile(values, q)
    assert statistic.value == np.quantile(values, q)
    drawn = Resamples.draw(n, max(1, n // 7), 3, rng)
    for row, found in zip(drawn.weights, statistic.resampled(drawn), strict=True):
        sample = np.repeat(values, row.astype(int))
        # One value is its own quantile; scipy has an answer from two on.
        expected = theirs(sample, [q])[0] if n > 1 else values[0]
        assert found == pytest.approx(float(expected), rel=1e-7)


@given(st.integers(1, 60), st.data())
def test_resamples_are_whole_circular_blocks(n: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, n))
    drawn = Resamples.draw(n, length, 20, np.random.default_rng(n))
    for row, begin in zip(drawn.weights, drawn.starts, strict=True):
        index = (begin[:, None] + np.arange(length)).ravel()[:n] % n
        assert row.tolist() == np.bincount(index, minlength=n).tolist()
    assert Resamples.whole(n).weights.tolist() == [[1.0] * n]


def test_with_blocks_of_one_row_it_is_the_plain_bootstrap_of_scipy() -> None:
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    rng = np.random.default_rng(3)
    measured = rng.lognormal(size=500)
    simulated = measured * rng.lognormal(0.02, 0.3, size=500)

    def error(a: stats.FloatArray, b: stats.FloatArray, axis: int) -> stats.FloatArray:
        return np.asarray(b.mean(axis=axis) / a.mean(axis=axis) - 1)

    theirs = bootstrap(
        (measured, simulated), error, paired=True, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    ours = stats.bootstrap(
        500, 1, {"x": stats.ratio_of_sums(simulated, measured)}, np.random.default_rng(1), resamples=4000
    )["x"]
    # Both ends are Monte Carlo: the standard error of a 2.5 % quantile of 4000 normals is 0.042 sigma.
    sigma = (theirs.high - theirs.low) / 3.92
    assert ours == pytest.approx((theirs.low, theirs.high), abs=4 * 0.042 * 1.5 * sigma)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_block_length_of_ar1_is_near_its_closed_form(rho: float) -> None:
    # R(k) = rho^k: G = 2 rho / (1 - rho)^2, g(0) = (1 + rho) / (1 - rho), b = (1.5 G^2 / g(0)^2 n)^(1/3).
    n = 20_000
    best = (1.5 * (2 * rho / (1 - rho) ** 2) ** 2 / ((1 + rho) / (1 - rho)) ** 2 * n) ** (1 / 3)
    series = ar1(np.random.default_rng(0), rho, 1, n)[0]
    assert stats.block_length(series) == pytest.approx(4 * best, rel=0.25)


def test_block_length_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    assert stats.block_length(np.ones(100)) == 1
    assert stats.block_length(np.array([1.0])) == 1
    assert stats.block_length(np.arange(200.0)) == 40  # a trend: the longest that leaves five blocks
    assert stats.block_length(rng.standard_normal(5000)) == 18  # independent: the cube root of n
    assert stats.block_length(np.tile([1.0, -1.0], 100)) >= 1


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_the_intervals_cover_a_known_truth(rho: float) -> None:
    """250 pairs of log-normal AR(1) latencies; truth in closed form; nominal 95 %.

    Measured over 1000 pairs: mean 94, 94, 91 %; p50 98, 97, 96 %; p90 99, 98, 97 % (rho 0, 0.6, 0.9). The bound is
    the worst of these less 2.7 binomial standard errors of 250: 0.913 - 2.7 sqrt(0.913 * 0.087 / 250) = 0.865.
    """
    covered = coverage(rho, pairs=250)
    assert all(share >= 0.865 for share in covered.values()), covered


def test_single_rows_would_claim_far_too_much() -> None:
    assert coverage(0.9, pairs=250, length=1)["mean"] < 0.6


def coverage(rho: float, pairs: int, length: int | None = None, n: int = 300) -> dict[str, float]:
    """Share of intervals that hold the truth, per statistic."""
    rng = np.random.default_rng(1)
    common, own = ar1(rng, rho, pairs, n), ar1(rng, rho, pairs, n)
    all_measured, all_simulated = np.exp(0.6 * common), np.exp(0.5 * common + 0.2 * own + 0.05)
    spread = np.hypot(0.5, 0.2)
    truth = {
        "mean": np.exp(0.05 + (spread**2 - 0.36) / 2) - 1,
        "p50": np.exp(0.05) - 1,
        "p90": np.exp(0.05 + 1.2815515655446004 * (spread - 0.6)) - 1,
    }
    hits = dict.fromkeys(truth, 0)
    for row, (measured, simulated) in enumerate(zip(all_measured, all_simulated, strict=True)):
        rows = length or stats.block_length(simulated / simulated.mean() - measured / measured.mean())
        statistics = {
            "mean": stats.ratio_of_sums(simulated, measured),
            "p50": stats.quantile_ratio(measured, simulated, 0.5),
            "p90": stats.quantile_ratio(measured, simulated, 0.9),
        }
        intervals = stats.bootstrap(n, rows, statistics, np.random.default_rng(row), resamples=300)
        for name, (low, high) in intervals.items():
            hits[name] += low <= truth[name] <= high
    return {name: count / pairs for name, count in hits.items()}


def test_the_interval_depends_on_seed_and_name_only() -> None:
    values = np.random.default_rng(0).lognormal(size=50)
    results = [
        stats.bootstrap(50, 3, {"x": stats.mean(values)}, stats.stream(seed, name))["x"]
        for seed, name in [(1, "a"), (1, "a"), (2, "a"), (1, "b")]
    ]
    assert results[0] == results[1]
    assert len(set(results)) == 3


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).lognormal(size=400)
    statistics = {"x": stats.mean(values)}
    whole = stats.bootstrap(400, 5, statistics, np.random.default_rng(0))["x"]
    monkeypatch.setattr(stats, "_CHUNK_DRAWS", 1000)
    assert stats.bootstrap(400, 5, statistics, np.random.default_rng(0))["x"] == pytest.approx(whole, rel=1e-12)


def test_resamples_are_bounded_for_long_runs() -> None:
    assert [stats.num_resamples(n) for n in (1, 20_000, 500_000, 10**8)] == [1000, 1000, 400, 200]


def test_a_statistic_without_a_value_has_no_interval() -> None:
    nothing = {"x": stats.ratio_of_sums(np.ones(10), np.zeros(10))}
    assert np.isnan(stats.bootstrap(10, 1, nothing, np.random.default_rng(0))["x"]).all()
