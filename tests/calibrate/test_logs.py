"""Prices from request logs alone: planted prices come back, what a log cannot tell is said, bad logs are refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from kvtwin.calibrate.logs.calibrate import calibrate_logs, stages
from kvtwin.calibrate.logs.fit import GROWTH, MIN_REQUESTS, fit_logs
from kvtwin.calibrate.logs.holdout import judge_log
from kvtwin.calibrate.logs.log import Log
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

PRICES = {"step": 8e6, "prefill_tokens": 4e4, "decode_context": 60.0, "num_reqs": 5e4}
CONFIG = VllmConfig(
    num_gpu_blocks=20_000, max_num_batched_tokens=2048, max_num_seqs=128, async_scheduling=False,
    enable_prefix_caching=False,
)  # fmt: skip


class NoisyLatency:
    """Known prices; every step takes a random share more or less."""

    def __init__(self, prices: Mapping[str, float], noise: float, seed: int) -> None:
        self._latency = RegressionLatency(prices)
        shape = 1 / noise**2 if noise else 1.0
        self._factor = np.random.default_rng(seed).gamma(shape, 1 / shape, 100_000) if noise else np.ones(100_000)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        factor = self._factor[first_step : first_step + len(batches)]
        found: IntArray = np.maximum(np.rint(self._latency.step_ns(batches, first_step) * factor), 1).astype(np.int64)
        return found


def recorded(
    seed: int = 0,
    *,
    requests: int = 120,
    rate: float = 12.0,
    noise: float = 0.0,
    prices: Mapping[str, float] = PRICES,
    equal_contexts: bool = False,
) -> Run:
    """A log of an engine of known prices."""
    rng = np.random.default_rng([seed, 7])
    inputs = np.full(requests, 200) if equal_contexts else rng.integers(20, 1500, requests)
    columns = {
        "request_id": [f"r{i}" for i in range(requests)],
        "arrival_ns": np.cumsum(rng.exponential(1e9 / rate, requests)).astype(np.int64).tolist(),
        "input_tokens": inputs.tolist(),
        "output_tokens": ([3] * requests if equal_contexts else rng.integers(10, 200, requests).tolist()),
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "run")})
    run = simulate(workload, CONFIG, NoisyLatency(prices, noise, seed))
    return Run(RunInfo("recorded", engine="vllm 0.32.0"), {"requests": run.requests})


def with_column(run: Run, name: str, values: list[int | None]) -> Run:
    columns = {key: run.requests.column(key).to_pylist() for key in run.requests.column_names} | {name: values}
    return Run(run.info, {"requests": from_columns("requests", columns, "run")})


# ---- the fit -------------------------------------------------------------------------------------------------


def test_planted_prices_come_back() -> None:
    fit = fit_logs([Log.of(recorded(), CONFIG)], tuple(PRICES))
    assert fit.prices_ns[:2] == pytest.approx([PRICES["step"], PRICES["prefill_tokens"]], rel=0.01)
    assert fit.prices_ns[2:] == pytest.approx([PRICES["decode_context"], PRICES["num_reqs"]], rel=0.1)  # much alike
    assert np.quantile(np.abs(fit.errors), 0.95) < 0.02


def test_noisy_prices_lie_in_their_intervals_and_the_intervals_are_not_empty_words() -> None:
    hits, widths = [], []
    for seed in range(4):
        doubt = fit_logs([Log.of(recorded(seed, noise=0.2), CONFIG)], tuple(PRICES)).doubt
        for name, truth in PRICES.items():
            low, high = doubt.parameters[name].interval
            hits.append(low <= truth <= high)
            widths.append((high - low) / truth if name in ("step", "prefill_tokens") else 0.0)
    assert np.mean(hits) >= 0.85
    assert max(widths) < 0.8


def test_what_the_log_cannot_tell_is_said() -> None:
    """Every prompt is as long as any other and decodes twice: the price of a prompt's tokens and of a prefill step
    are one number."""
    run = recorded(equal_contexts=True, noise=0.1, rate=2.0)
    doubt = fit_logs([Log.of(run, CONFIG)], ("step", "prefill_tokens", "prefill_step")).doubt
    assert not (doubt.parameters["prefill_tokens"].known and doubt.parameters["prefill_step"].known)
    assert doubt.parameters["step"].known


def test_a_feature_that_never_occurs_has_no_interval() -> None:
    fit = fit_logs([Log.of(recorded(), CONFIG)], ("step", "prefill_tokens", "tokens_over_8192"))
    found = fit.doubt.to_json()["parameters"]["tokens_over_8192"]
    assert found == {"value": 0.0, "interval": [0.0, None], "known": False}
    assert "tokens_over_8192" not in fit.latency.coefficients_ns


def test_times_of_other_requests_do_not_reach_the_fit() -> None:
    run = recorded(noise=0.1)
    later = [None if i >= 60 else value for i, value in enumerate(run.requests.column("finish_ns").to_pylist())]
    first = Log.of(run, CONFIG).halves()[0]
    same = Log.of(with_column(run, "finish_ns", later), CONFIG).halves()[0]
    fits = [fit_logs([log], tuple(PRICES)).prices_ns.tolist() for log in (first, same)]
    assert fits[0] == fits[1]


def test_the_client_clock_is_used_where_the_engine_has_none() -> None:
    run = recorded()
    silent = with_column(run, "queued_ns", [None] * run.requests.num_rows)
    assert (Log.of(run, CONFIG).clock, Log.of(silent, CONFIG).clock) == ("queued_ns", "arrival_ns")
    prices = fit_logs([Log.of(silent, CONFIG)], tuple(PRICES)).prices_ns
    assert prices[:2] == pytest.approx([PRICES["step"], PRICES["prefill_tokens"]], rel=0.02)


# ---- the profile ---------------------------------------------------------------------------------------------


def test_a_single_log_is_judged_on_its_later_half() -> None:
    told: list[str] = []
    profile = calibrate_logs([Log.of(recorded(noise=0.05), CONFIG)], progress=told.append)
    assert tuple(told) == stages(1)
    assert profile.provenance["held_out"] == "the later half of the requests, by arrival"
    assert {name: found["n"] for name, found in profile.accuracy.items()} == {"ttft": 60, "tpot": 60, "latency": 60}
    assert profile.accuracy["tpot"]["mape"] < 0.03
    assert abs(profile.accuracy["latency"]["distribution"]["mean"]) < 0.03
    assert profile.provenance["features"] in GROWTH
    assert profile.provenance["runs"][0]["clock"] == "queued"
    assert profile.engine == "vllm 0.32.0"
    assert not profile.extrapolates(BatchStats.of_batch([500], [1])).any()
    assert profile.extrapolates(BatchStats.of_batch([500_000], [1])).all()


def test_the_simplest_of_equal_models_is_taken() -> None:
    """One standard error is exceeded by chance in one case of six; in this recording it is not."""
    prices = {"step": 8e6, "prefill_tokens": 4e4}
    profile = calibrate_logs([Log.of(recorded(1, noise=0.05, prices=prices), CONFIG)])
    assert profile.provenance["features"] == "prompts"
    tried = profile.provenance["features_tried"]
    assert tried["fixed"]["loss"] > 2 * tried["prompts"]["loss"]


def test_several_logs_are_left_out_in_turn() -> None:
    slow = {name: 1.5 * price for name, price in PRICES.items()}
    logs = [
        Log.of(recorded(1, requests=40), CONFIG),
        Log.of(recorded(2, requests=40, rate=2.0, prices=slow), CONFIG),
    ]
    found = calibrate_logs(logs).accuracy
    assert found["tpot of log 1"]["bias"] > 0.3  # predicted with prices 1.5 times as high, and the queues they make
    assert found["tpot of log 2"]["bias"] == pytest.approx(1 / 1.5 - 1, abs=0.1)
    assert found["tpot"]["n"] == found["tpot of log 1"]["n"] + found["tpot of log 2"]["n"]


def test_judging_leaves_out_what_was_not_measured() -> None:
    run = recorded()
    known = [value if i % 2 else None for i, value in enumerate(run.requests.column("finish_ns").to_pylist())]
    log = Log.of(with_column(run, "finish_ns", known), CONFIG)
    found = judge_log(log, RegressionLatency(PRICES))
    assert found["ttft"].shape == (2, 120)
    assert found["tpot"].shape == (2, 60)
    assert found["tpot"][0] == pytest.approx(found["tpot"][1])


# ---- refusals ------------------------------------------------------------------------------------------------


def refusal(run: Run) -> str:
    with pytest.raises(InputError) as caught:
        calibrate_logs([Log.of(run, CONFIG)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_requests_are_refused() -> None:
    assert f"30 requests with a first-token time: at least {MIN_REQUESTS} are needed" not in refusal(
        recorded(requests=2 * MIN_REQUESTS - 2)
    )
    assert refusal(recorded(requests=40)).startswith("20 requests with a first-token time: at least 30 are needed")


def test_times_that_cannot_be_are_refused() -> None:
    run = recorded(requests=70)
    finish, first = (run.requests.column(name).to_pylist() for name in ("finish_ns", "first_token_ns"))
    assert "row 5, finish_ns: 0 ns after first_token_ns: a positive time expected" in refusal(
        with_column(run, "finish_ns", [first[5] if i == 5 else value for i, value in enumerate(finish)])
    )


def test_logs_of_several_instances_are_refused() -> None:
    run = recorded(requests=70)
    message = refusal(with_column(run, "instance", [i % 2 for i in range(70)]))
    assert message == "instance: 2 engine instances served these requests: split the log, one run per instance"


def test_a_log_in_another_unit_is_refused() -> None:
    """Written in microseconds, read as nanoseconds."""
    run = recorded(requests=70)
    for name in ("arrival_ns", "queued_ns", "first_token_ns", "finish_ns"):
        run = with_column(run, name, [value // 1000 for value in run.requests.column(name).to_pylist()])
    message = refusal(run)
    assert message.startswith("finish_ns: an output token takes ")
    assert message.endswith("ns in the median: 20 us to 100 s expected (are these microseconds?); give nanoseconds")
