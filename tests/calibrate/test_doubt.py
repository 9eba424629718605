"""What a fit says of its own limits: intervals, unknown combinations, diagnostics, floors, and what to measure next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvtwin.calibrate.design import Limits, batches_of, candidates, next_batches
from kvtwin.calibrate.diagnostics import diagnose
from kvtwin.calibrate.identify import Doubt, find_doubt
from kvtwin.calibrate.noise import run_floor, step_floor
from kvtwin.calibrate.robust import fit_nonnegative, fit_with_speeds
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.calibrate.steps.holdout import held_out_steps, learning_curve
from kvtwin.sim.latency.regression import design
from kvtwin.sim.latency.stats import BatchStats, durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

MakeRun = Callable[..., Run]
Floats = np.ndarray[Any, np.dtype[np.float64]]


# ---- intervals -----------------------------------------------------------------------------------------------


def linear(rng: np.random.Generator, rho: float, *, n: int = 400) -> tuple[Floats, Floats, Floats]:
    """Rows, truth and data of a linear model whose noise and second regressor remember the row before."""
    rows = np.column_stack([np.ones(n), remembering(rng, n, rho) + 3])
    truth = np.array([2.0, 1.0])
    return rows, truth, rows @ truth + remembering(rng, n, rho)


def remembering(rng: np.random.Generator, n: int, rho: float) -> Floats:
    values = rng.normal(size=n)
    for i in range(1, n):
        values[i] = rho * values[i - 1] + np.sqrt(1 - rho * rho) * values[i]
    return values


def doubt_of(rows: Floats, data: Floats) -> Doubt:
    values = np.linalg.lstsq(rows, data, rcond=None)[0].astype(np.float64)
    return find_doubt(["a", "b"], values, data - rows @ values, rows, np.ones(len(data)), np.arange(len(data)))


@pytest.mark.parametrize(("rho", "least", "most"), [(0.0, 0.90, 0.99), (0.8, 0.85, 0.99)])
def test_intervals_cover_the_truth(rho: float, least: float, most: float) -> None:
    """95 % intervals, 300 samples; with rho 0.8 independent errors would cover 65 %."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        rows, truth, data = linear(rng, rho)
        found = doubt_of(rows, data).parameters
        hits += [
            found[name].interval[0] <= value <= found[name].interval[1] for name, value in zip("ab", truth, strict=True)
        ]
    assert least <= np.mean(hits) <= most


def test_two_equal_columns_are_known_as_a_sum_only() -> None:
    rng = np.random.default_rng(0)
    column = rng.uniform(1, 2, 200)
    rows = np.column_stack([column, column, np.ones(200)])
    values = np.array([2.0, 1.0, 5.0])
    found = find_doubt(list("abc"), values, rng.normal(0, 0.1, 200), rows, np.ones(200), np.arange(200))
    assert found.parameters["a"].interval[0] == pytest.approx(0, abs=0.2)
    assert found.parameters["a"].interval[1] == pytest.approx(3, abs=0.2)
    assert [found.parameters[name].known for name in "abc"] == [False, False, True]
    direction, sd = found.vague[0]
    assert sd is None
    assert direction["a"] * values[0] == pytest.approx(-direction["b"] * values[1], rel=0.01)
    assert found.to_json()["vague"][0]["relative_sd"] is None


def test_a_widened_interval_is_wider() -> None:
    rows, _, data = linear(np.random.default_rng(1), 0.0)
    values = np.linalg.lstsq(rows, data, rcond=None)[0].astype(np.float64)
    residuals, weight, order = data - rows @ values, np.ones(len(data)), np.arange(len(data))
    plain, wide = (
        find_doubt(["a", "b"], values, residuals, rows, weight, order, widen=factor).parameters["b"].interval
        for factor in (1.0, 2.0)
    )
    assert wide[1] - wide[0] == pytest.approx(2 * (plain[1] - plain[0]))


def test_prices_of_steps_lie_in_their_intervals(known_run: MakeRun, truth: dict[str, float]) -> None:
    hits = []
    for seed in range(12):
        profile = calibrate_steps([known_run(300, 2 * seed + part, noise=0.02) for part in (0, 1)])
        found = profile.provenance["doubt"]["parameters"]
        if set(truth) <= set(found):  # with fewer features their prices stand for what is left out
            hits += [found[name]["interval"][0] <= price <= found[name]["interval"][1] for name, price in truth.items()]
    assert len(hits) >= 40
    assert np.mean(hits) >= 0.88


# ---- speeds of days ------------------------------------------------------------------------------------------


def test_a_slow_day_does_not_tilt_the_prices() -> None:
    """The day of large batches is slow: without its speed, the price per unit would explain it."""
    rng = np.random.default_rng(0)
    day = np.repeat([0, 1, 2], 300)
    size = rng.uniform(1, 10, 900) * np.where(day == 2, 3, 1)
    slowness = np.array([0.8, 1.0, 1.2])
    rows = np.column_stack([np.ones(900), size])
    times = slowness[day] * (rows @ [100.0, 10.0]) * rng.gamma(400, 1 / 400, 900)
    prices, found = fit_with_speeds(rows, times, day)
    assert found == pytest.approx(slowness, rel=0.02)
    assert prices == pytest.approx([100.0, 10.0], rel=0.03)
    assert fit_nonnegative(rows, times)[1] > 11.5


def test_speeds_are_told_from_three_recordings_on(known_run: MakeRun) -> None:
    runs = [known_run(200, seed, speed=speed) for seed, speed in enumerate((1.0, 1.25, 0.8))]
    profile = calibrate_steps(runs)
    mean = (1 + 1 / 1.25 + 1 / 0.8) / 3
    assert list(profile.provenance["slowness"].values()) == pytest.approx([1 / mean, 0.8 / mean, 1.25 / mean], rel=0.01)
    assert "slowness" not in calibrate_steps(runs[:2]).provenance


# ---- diagnostics ---------------------------------------------------------------------------------------------


def diagnosed(make_latency: Callable[[Floats, BatchStats], Floats], known_run: MakeRun) -> dict[str, Any]:
    run = known_run(1000, 0)
    batches, latency = BatchStats.of_steps(run.steps), durations_ns(run.steps).astype(np.float64)
    columns = design(batches, ("step", "num_tokens", "num_reqs", "decode_context"))
    times = make_latency(latency, batches)
    return diagnose(batches, times, columns, fit_nonnegative(columns, times))


def test_noise_that_depends_on_the_batch_is_seen(known_run: MakeRun) -> None:
    rng = np.random.default_rng(0)

    def even(latency: Floats, _: BatchStats) -> Floats:
        return latency * rng.gamma(100, 1 / 100, len(latency))

    def uneven(latency: Floats, batches: BatchStats) -> Floats:
        return np.where(batches.num_prefill > 0, latency, latency * rng.gamma(10, 1 / 10, len(latency)))

    calm, loud = (diagnosed(make, known_run)["heteroscedasticity"] for make in (even, uneven))
    assert calm["r2"] < 0.02
    assert loud["r2"] > 0.05
    assert loud["p"] < 1e-6
    assert loud["scatter"]["decode"] > 5 * loud["scatter"]["mixed"]


def test_a_row_that_decides_the_fit_is_named(known_run: MakeRun) -> None:
    rng = np.random.default_rng(0)

    def stalled(latency: Floats, _: BatchStats) -> Floats:
        times = latency * rng.gamma(1000, 1 / 1000, len(latency))
        times[17] *= 5
        return times

    influence = diagnosed(stalled, known_run)["influence"]
    assert influence["largest"][0]["row"] == 17
    assert influence["largest"][0]["residual"] > 2


# ---- what to measure next ------------------------------------------------------------------------------------


LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024, capacity_tokens=4096)


def test_candidates_are_batches_that_the_engine_makes() -> None:
    grid = candidates(LIMITS)
    n, context, chunk, prefix = grid.T
    assert len(grid) > 100
    assert len(np.unique(grid, axis=0)) == len(grid)
    assert np.all(n + chunk >= 1)
    assert np.all((n + (chunk > 0) <= 8) & (n + chunk <= 256) & (chunk + prefix <= 1024))
    assert np.all(n * (context + 1) + chunk + prefix <= 4096)
    batches = batches_of(grid)
    row = int(np.flatnonzero((n == 4) & (context == 512) & (chunk == 128) & (prefix == 256))[0])
    one = BatchStats.of_batch([512, 512, 512, 512, 256], [1, 1, 1, 1, 128])
    assert batches[np.array([row])].table.tolist() == one.table.tolist()


def test_what_was_never_measured_is_measured_next() -> None:
    """Only short contexts were measured, often: the price of context is what is not known."""
    features = ("step", "decode_context")
    prices = np.array([1e6, 500.0])
    grid = candidates(LIMITS)
    seen = grid[(grid[:, 1] <= 16) & (grid[:, 2] == 0)]
    columns = np.tile(design(batches_of(seen), features), (50, 1))
    plan = next_batches(features, prices, columns / (columns @ prices)[:, None], LIMITS, noise=0.1)
    assert len(plan["batches"]) == 20
    assert np.mean([batch["num_decode"] * batch["decode_cache_len"] > 1000 for batch in plan["batches"]]) > 0.8
    before, after = plan["relative_sd"]["before"], plan["relative_sd"]["after"]
    assert after["mean"] < 0.3 * before["mean"]
    assert after["worst"] < 0.3 * before["worst"]


def test_the_plan_beats_a_random_one_on_real_refits() -> None:
    """Measure the planned 20 batches, or 20 random ones, and fit again: the planned ones leave the smaller error."""
    features = ("step", "num_tokens", "decode_context", "prefill_pairs")
    prices = np.array([2e6, 3e4, 300.0, 40.0])
    grid = candidates(LIMITS)
    everything = design(batches_of(grid), features)
    seen = everything[(grid[:, 1] <= 32) & (grid[:, 2] == 0)][:40]
    plan = next_batches(features, prices, seen / (seen @ prices)[:, None], LIMITS, noise=0.1)["batches"]
    planned = design(batches_of(np.array([list(batch.values()) for batch in plan])), features)
    rng = np.random.default_rng(0)
    errors: dict[str, list[float]] = {"planned": [], "random": []}
    for _ in range(40):
        for name, more in (("planned", planned), ("random", everything[rng.choice(len(grid), 20, replace=False)])):
            rows = np.concatenate([seen, more])
            fitted = fit_nonnegative(rows, (rows @ prices) * rng.gamma(100, 1 / 100, len(rows)))
            errors[name].append(float(np.mean(np.abs(everything @ fitted / (everything @ prices) - 1))))
    assert np.mean(errors["planned"]) < np.mean(errors["random"])


# ---- floors --------------------------------------------------------------------------------------------------


def test_the_floors_of_one_recording(known_run: MakeRun) -> None:
    """Other days are 1.2 times slower; every step is the same twice, up to 5 % noise (relative difference 1.13 x)."""
    one = known_run(400, 0, noise=0.05)
    others = [known_run(400, 0, noise=0.05, speed=1 / 1.2) for _ in range(2)]
    found = run_floor(one, others)
    assert found.repeat is not None
    assert found.repeat == pytest.approx(0.2, abs=0.02)
    assert found.known == pytest.approx(0.2, abs=0.02)
    assert found.matched == 1
    assert run_floor(one, []).repeat is None
    pair = step_floor([one, others[0]])
    assert pair is not None
    assert found.repeat > pair.metrics["step_mape"] > 0.15  # the pair's floor also counts the slow day's view


def test_within_a_recording_only_jitter_counts(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    run = make_run([[(0, 100, 1)]] * 4000, np.rint(1e6 * rng.normal(1, 0.05, 4000)))
    # Two normal values, relative: E|x - y| / mean = 2 sd / sqrt(pi).
    assert run_floor(run, []).within == pytest.approx(2 * 0.05 / np.sqrt(np.pi), rel=0.05)
    lonely = make_run([[(0, round(100 * 1.5**i), 1)] for i in range(30)], [1000] * 30)
    assert run_floor(lonely, []).within is None


def test_test_runs_take_no_part(known_run: MakeRun) -> None:
    runs = [known_run(200, seed, noise=0.1) for seed in (0, 1)]
    test = known_run(200, 2, noise=0.1, speed=0.5)
    alone, judged = calibrate_steps(runs), calibrate_steps(runs, test=[test])
    assert alone.latency == judged.latency
    found = judged.accuracy["test: run 1"]
    assert found["bias"] == pytest.approx(-0.5, abs=0.03)
    assert found["ratio"]["repeat"] == pytest.approx(found["mape"] / found["floor"]["repeat"])
    with pytest.raises(InputError, match="engine: 'b' here, 'a' in the first recording"):
        calibrate_steps([known_run(60, 0, engine="a")], test=[known_run(60, 1, engine="b")])


# ---- what the plots show -------------------------------------------------------------------------------------


def test_held_out_steps_are_those_of_the_profile(known_run: MakeRun) -> None:
    runs = [known_run(200, seed, noise=0.1) for seed in (0, 1)]
    profile = calibrate_steps(runs)
    steps = held_out_steps(runs, profile)
    error = np.mean(np.abs(steps.predicted_ns / steps.measured_ns - 1))
    assert error == pytest.approx(profile.accuracy["steps"]["mape"])


def test_more_steps_teach_more(known_run: MakeRun) -> None:
    runs = [known_run(400, seed, noise=0.2) for seed in (0, 1)]
    curve = learning_curve(runs, calibrate_steps(runs))
    assert [point["n"] for point in curve] == [32, 64, 128, 256, 400]
    assert np.mean(curve[0]["mape"]) > np.mean(curve[-1]["mape"])
    assert max(curve[-1]["mape"]) == pytest.approx(min(curve[-1]["mape"]))  # all there are: nothing to draw
