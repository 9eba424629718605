"""The fit against known engines, its contract, what it refuses, and the recordings of a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import kvtwin.traces
from kvtwin.calibrate.noise import step_floor
from kvtwin.calibrate.robust import fit_nonnegative
from kvtwin.calibrate.stats import mape
from kvtwin.calibrate.steps.calibrate import STAGES, calibrate_steps
from kvtwin.calibrate.steps.holdout import held_out
from kvtwin.calibrate.steps.regression import FEATURE_SETS, NotFittedError, StepRegression
from kvtwin.calibrate.steps.samples import MIN_STEPS
from kvtwin.sim.latency.profile import read_profile
from kvtwin.sim.latency.regression import FEATURES, RegressionLatency, design
from kvtwin.sim.latency.stats import REGIMES, BatchStats, durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo

MakeRun = Callable[..., Run]
RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"


def samples(run: Run) -> tuple[BatchStats, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    return BatchStats.of_steps(run.steps), durations_ns(run.steps).astype(np.float64)


# ---- the fit -------------------------------------------------------------------------------------------------


def test_exact_prices_come_back_exactly(known_run: MakeRun, truth: dict[str, float]) -> None:
    fitted = StepRegression(tuple(truth)).fit(*samples(known_run(200, 0)))
    assert fitted.coefficients_ns_ == pytest.approx(list(truth.values()), rel=1e-6)


def test_noisy_prices_come_back_within_their_standard_error(known_run: MakeRun, truth: dict[str, float]) -> None:
    """30 % gamma noise on 4,000 steps: within 3 standard errors, from (X' diag(1/mean^2) X)^-1 * 0.3^2."""
    run = known_run(4000, 0, noise=0.3)
    batches, latency = samples(run)
    columns = design(batches, tuple(truth))
    scaled = columns / (columns @ list(truth.values()))[:, None]
    error = 0.3 * np.sqrt(np.diag(np.linalg.inv(scaled.T @ scaled)))
    found = StepRegression(tuple(truth)).fit(batches, latency).coefficients_ns_
    assert np.all(np.abs(found - list(truth.values())) < 3 * error)


def test_the_total_time_comes_out_right_where_noise_is_skewed() -> None:
    """Log-normal noise of 40 %: the mean is 8 % above the median, and sums need the mean."""
    noise = np.random.default_rng(0).lognormal(0, 0.4, 20_000)
    fitted = fit_nonnegative(np.ones((20_000, 1)), noise)
    assert fitted[0] == pytest.approx(np.exp(0.08), rel=0.02)


def test_stalls_do_not_tilt_the_fit(known_run: MakeRun, truth: dict[str, float]) -> None:
    batches, latency = samples(known_run(2000, 0, noise=0.1))
    stalled = latency.copy()
    stalled[[3, 700, 1500]] *= 1000  # a kernel compiled, a machine that slept
    calm, shaken = (StepRegression(tuple(truth)).fit(batches, times).coefficients_ns_ for times in (latency, stalled))
    assert shaken == pytest.approx(calm, rel=0.05)


def test_no_price_is_negative(known_run: MakeRun) -> None:
    batches, _ = samples(known_run(300, 0))
    shrinking = 1e9 / batches.num_tokens
    assert np.all(StepRegression(tuple(FEATURES)).fit(batches, shrinking).coefficients_ns_ >= 0)


def test_a_feature_that_never_occurs_costs_nothing(known_run: MakeRun) -> None:
    batches, latency = samples(known_run(300, 0))
    fitted = StepRegression(["step", "num_tokens", "tokens_over_8192"]).fit(batches, latency)
    assert fitted.coefficients_ns_[2] == 0
    assert list(fitted.to_latency().coefficients_ns) == ["step", "num_tokens"]


# ---- the estimator's contract --------------------------------------------------------------------------------


def test_fitting_twice_is_fitting_once(known_run: MakeRun) -> None:
    first, second = samples(known_run(200, 0, noise=0.2)), samples(known_run(300, 1, noise=0.2))
    features = FEATURE_SETS["everything"]
    again = StepRegression(features).fit(*first).fit(*second)
    assert again.coefficients_ns_.tolist() == StepRegression(features).fit(*second).coefficients_ns_.tolist()


def test_fit_returns_the_estimator_and_leaves_its_input_alone(known_run: MakeRun) -> None:
    batches, latency = samples(known_run(100, 0))
    table, times = batches.table.copy(), latency.copy()
    estimator = StepRegression(["step"])
    assert estimator.fit(batches, latency) is estimator
    assert estimator.features == ("step",)
    assert np.array_equal(table, batches.table)
    assert np.array_equal(times, latency)


def test_the_latency_model_predicts_what_was_fitted(known_run: MakeRun) -> None:
    batches, latency = samples(known_run(100, 0, noise=0.1))
    fitted = StepRegression(FEATURE_SETS["work"]).fit(batches, latency)
    expected = design(batches, fitted.features) @ fitted.coefficients_ns_
    assert fitted.to_latency().step_ns(batches, 0) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("use", [lambda r: r.coefficients_ns_, lambda r: r.to_latency()])
def test_unfitted_use_says_so(use: Callable[[StepRegression], object]) -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        use(StepRegression(["step"]))


def test_impossible_samples_are_refused(known_run: MakeRun) -> None:
    batches, latency = samples(known_run(60, 0))
    for bad in (latency[:-1], np.where(np.arange(60) == 7, 0, latency), np.where(np.arange(60) == 7, np.nan, latency)):
        with pytest.raises(ValueError, match="one positive latency per batch"):
            StepRegression(["step"]).fit(batches, bad)
    with pytest.raises(InputError, match="unknown feature 'sted'; known: step, "):
        StepRegression(["sted"]).fit(batches, latency)


def test_feature_sets_are_nested_and_the_last_has_all() -> None:
    sets = [set(features) for features in FEATURE_SETS.values()]
    assert all(small < large for small, large in pairwise(sets))
    assert sets[-1] == set(FEATURES)
    assert all("step" in features for features in sets)


# ---- held out ------------------------------------------------------------------------------------------------


def test_whole_runs_are_left_out(known_run: MakeRun) -> None:
    """One run is twice as fast. A fit that saw neighbours of a step would predict it well; one that did not is off
    by the other run's speed, in both directions."""
    slow, fast = known_run(300, 0), known_run(300, 0, speed=2.0)
    found = calibrate_steps([slow, fast]).accuracy
    assert found["steps of run 1"]["bias"] == pytest.approx(-0.5, abs=0.01)
    assert found["steps of run 2"]["bias"] == pytest.approx(1.0, abs=0.02)
    assert found["steps"]["n"] == 600


def test_a_single_run_is_held_out_in_stretches_of_time(make_run: MakeRun) -> None:
    """The machine is 4 times slower in the third fifth: neighbours would know, the other fifths do not."""
    latency = np.full(100, 1_000_000)
    latency[40:60] *= 4
    profile = calibrate_steps([make_run([[(0, 10, 1)]] * 100, latency)])
    assert profile.provenance["held_out"] == "5 contiguous stretches of time"
    fold = np.arange(100) // 20
    predicted = held_out(BatchStats.of_steps(make_run([[(0, 10, 1)]] * 100, latency).steps), latency, fold, ["step"])
    assert predicted[40:60] == pytest.approx(np.full(20, 1e6), rel=1e-6)
    assert profile.accuracy["steps"]["mape"] > 0.14


def test_held_out_steps_do_not_reach_their_own_prediction(known_run: MakeRun) -> None:
    batches, latency = samples(known_run(200, 0, noise=0.2))
    fold = np.arange(200) // 100
    changed = latency.copy()
    changed[:100] *= 7.0
    features = FEATURE_SETS["work"]
    before, after = (held_out(batches, times, fold, features) for times in (latency, changed))
    assert before[:100].tolist() == after[:100].tolist()
    assert before[100:].tolist() != after[100:].tolist()


# ---- the profile ---------------------------------------------------------------------------------------------


def test_the_simplest_of_equal_feature_sets_is_taken(known_run: MakeRun) -> None:
    profile = calibrate_steps([known_run(400, seed, noise=0.02) for seed in (0, 1)])
    assert profile.provenance["features"] == "work"  # holds TRUTH's features; the larger sets add noise only
    tried = profile.provenance["features_tried"]
    assert list(tried) == list(FEATURE_SETS)
    assert tried["tokens"]["deviance"] > tried["work"]["deviance"]


def test_a_larger_feature_set_is_taken_where_it_pays(make_run: MakeRun) -> None:
    """Tokens beyond 128 cost four times as much: only the sets with a roofline can say so."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 1024, 400)
    latency = 1_000_000 + 10_000 * tokens + 30_000 * np.maximum(tokens - 128, 0)
    runs = [make_run([[(0, 0, int(n))] for n in part], latency[place]) for part, place in (
        (tokens[:200], slice(0, 200)), (tokens[200:], slice(200, 400)),
    )]  # fmt: skip
    profile = calibrate_steps(runs)
    assert profile.provenance["features"] == "roofline"
    assert profile.accuracy["steps"]["mape"] < 0.01


def test_a_profile_survives_its_file(known_run: MakeRun, tmp_path: Path) -> None:
    run = known_run(200, 0, noise=0.1, engine="vllm 1", hardware="abacus", model="m")
    profile = calibrate_steps([run])
    profile.write(tmp_path / "profile.json")
    read = read_profile(tmp_path / "profile.json")
    batches, _ = samples(run)
    assert (read.kind, read.engine, read.hardware, read.model) == ("regression", "vllm 1", "abacus", "m")
    assert read.latency_model().step_ns(batches, 0).tolist() == profile.latency_model().step_ns(batches, 0).tolist()
    assert json.loads(json.dumps(profile.to_json())) == json.loads((tmp_path / "profile.json").read_text())
    assert read.host == profile.host
    assert not read.extrapolates(batches).any()
    assert read.extrapolates(BatchStats.of_batch([100_000], [1])).all()


def test_what_the_accuracy_holds(known_run: MakeRun) -> None:
    runs = [known_run(300, seed, noise=0.2) for seed in (0, 1)]
    accuracy = calibrate_steps(runs).accuracy
    assert set(accuracy) == {
        "steps", *(f"{name} steps" for name in REGIMES), "steps of run 1", "steps of run 2",
        "noise floor of run 1, run 2",
    }  # fmt: skip
    assert sum(accuracy[f"{name} steps"]["n"] for name in REGIMES) == accuracy["steps"]["n"] == 600
    low, high = accuracy["steps"]["interval"]
    assert low < accuracy["steps"]["mape"] < high
    assert "steps of run 1" not in calibrate_steps(runs[:1]).accuracy


def test_a_fit_can_be_repeated_and_tells_its_progress(known_run: MakeRun) -> None:
    runs = [known_run(200, seed, noise=0.2) for seed in (0, 1)]
    told: list[str] = []
    one, two = calibrate_steps(runs, progress=told.append), calibrate_steps(runs)
    assert one.to_json() == two.to_json()
    assert tuple(told) == STAGES


def test_the_digest_names_the_data(known_run: MakeRun, tmp_path: Path) -> None:
    run = known_run(100, 0)
    run.write(tmp_path / "copy")
    others = [known_run(100, 1), Run.open(tmp_path / "copy")]
    first, other, copy = (calibrate_steps([r]).provenance["runs"][0] for r in (run, *others))
    assert first["sha256"] == copy["sha256"] != other["sha256"]
    assert (first["name"], copy["name"], first["steps"]) == ("run 1", "copy", 100)


# ---- refusals ------------------------------------------------------------------------------------------------


def refusal(*runs: Run) -> str:
    with pytest.raises(InputError) as caught:
        calibrate_steps(runs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_little_is_refused(known_run: MakeRun, make_run: MakeRun) -> None:
    assert refusal().startswith("no recording to calibrate on")
    assert refusal(known_run(MIN_STEPS - 1, 0)) == "49 steps in all: at least 50 are needed to fit and to judge the fit"
    assert "the steps table is empty" in refusal(make_run([], []))
    assert calibrate_steps([known_run(MIN_STEPS, 0)]).kind == "regression"


def test_a_run_without_steps_is_refused_by_name(known_run: MakeRun) -> None:
    info = RunInfo("recorded", source={"path": "data/log"})
    assert refusal(Run(info, {"requests": known_run(60, 0).requests})).startswith("data/log: no steps table")


def test_steps_that_took_no_time_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([[(0, 10, 1)]] * 60, [1000] * 30 + [0] + [1000] * 29)
    run.write(tmp_path / "run")
    message = refusal(Run.open(tmp_path / "run"))
    assert message == f"{tmp_path / 'run'}, row 30, end_ns: the step ends where it starts (30000 ns): " \
        "a duration of at least 1 ns expected"  # fmt: skip


def test_empty_batches_are_refused(make_run: MakeRun) -> None:
    assert refusal(make_run([[(0, 10, 1)]] * 59 + [[]], [1000] * 60)) == "row 59, request: the batch is empty"


@pytest.mark.parametrize("key", ["engine", "hardware", "model"])
def test_two_engines_are_never_mixed(known_run: MakeRun, key: str) -> None:
    runs = [known_run(60, seed, **{key: value}) for seed, value in ((0, "a"), (1, "b"))]
    assert refusal(*runs) == f"{key}: 'b' here, 'a' in the first recording: calibrate each on its own"
    unknown = calibrate_steps([runs[0], known_run(60, 1)])
    assert getattr(unknown, key) == "a"


def test_tensor_parallel_degrees_are_never_mixed(known_run: MakeRun) -> None:
    one, two = (known_run(60, n, engine_config={"tensor_parallel_size": n}) for n in (1, 2))
    assert "tensor_parallel_size: 2 here, 1 in the first" in refusal(one, two)
    assert calibrate_steps([two]).tensor_parallel_size == 2


@pytest.mark.parametrize(("factor", "hint"), [(1e-3, "microseconds"), (1e-6, "milliseconds"), (1e5, None)])
def test_steps_in_another_unit_are_refused(make_run: MakeRun, factor: float, hint: str | None) -> None:
    message = refusal(make_run([[(0, 10, 1)]] * 60, [round(5e6 * factor)] * 60))
    assert "20 us to 100 s expected" in message
    assert (f"(are these {hint}?)" in message) == (hint is not None)
    assert message.endswith("give nanoseconds")


def test_steps_and_requests_in_different_units_are_refused(known_run: MakeRun) -> None:
    run = known_run(200, 0)
    requests = run.requests.set_column(
        run.requests.schema.get_field_index("first_token_ns"), "first_token_ns", [[5 * 10**12] * run.requests.num_rows]
    )
    message = refusal(Run(run.info, {"requests": requests.cast(run.requests.schema), "steps": run.steps}))
    assert message.startswith(
        "first_token_ns: first tokens lie at 5,000.000 .. 5,000.000 s, but the steps cover 0.000 .. "
    )
    assert message.endswith("bring both tables to one unit (ns) and one clock")


# ---- a real engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "repeats"), [("poisson", 3), ("saturated", 4), ("shared_prefix", 3)])
def test_the_sweep_predicts_the_other_recordings_within_their_noise(workload: str, repeats: int) -> None:
    """Fitted on the sweeps alone: the MAPE of every step stays below 1.5 x what repeats of the workload show, in all
    and by regime (where the floor knows the regime)."""
    latency = calibrate_steps([Run.open(RUNS / name) for name in ("sweep_1", "sweep_2")]).latency_model()
    assert isinstance(latency, RegressionLatency)
    runs = [Run.open(RUNS / f"{workload}_{number}") for number in range(1, repeats + 1)]
    floor = step_floor(runs)
    assert floor is not None
    for run in runs:
        batches, measured = samples(run)
        predicted = latency.step_ns(batches, 0).astype(np.float64)
        assert mape(measured, predicted) < 1.5 * floor.metrics["step_mape"]
        for name in REGIMES:
            rows = batches.regime == name
            if f"step_mape_{name}" in floor.metrics:
                assert mape(measured[rows], predicted[rows]) < 1.5 * floor.metrics[f"step_mape_{name}"]
