"""Two profiles side by side: every kind of change is seen, and nothing where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvtwin.calibrate.diff import as_text, diff_profiles
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def profile(known_run: MakeRun) -> Profile:
    return calibrate_steps([known_run(200, seed, noise=0.05, engine="vllm 1") for seed in (0, 1)])


def test_a_profile_does_not_differ_from_itself(profile: Profile) -> None:
    found = diff_profiles(profile, profile)
    assert (found["facts"], found["host"], found["domain"]) == ({}, {}, {})
    assert found["data"] == {"only_old": [], "only_new": [], "both": 2}
    assert all(one["ratio"] == 1 and one["overlap"] for one in found["prices"].values())
    assert found["predictions"]["mean_size"] == 0
    assert found["predictions"]["n"] > 50


def test_what_changed_is_found(profile: Profile) -> None:
    prices = {name: 1.25 * price for name, price in profile.latency["coefficients_ns"].items()}
    doubt = {
        "parameters": {
            name: {"value": price, "interval": [price, price], "known": True} for name, price in prices.items()
        }
    }
    new = replace(
        profile,
        latency={"coefficients_ns": prices},
        engine="vllm 2",
        host=replace(profile.host, gap_ns=7),
        domain={**profile.domain, "num_decode": (0.0, 4.0)},
        accuracy={"steps": {**profile.accuracy["steps"], "mape": 0.5}},
        provenance={**profile.provenance, "runs": profile.provenance["runs"][:1], "doubt": doubt},
    )
    found = diff_profiles(profile, new)
    assert found["facts"] == {"engine": ["vllm 1", "vllm 2"]}
    assert found["data"] == {"only_old": ["run 2"], "only_new": [], "both": 1}
    assert found["host"] == {"gap_ns": [0, 7]}
    assert found["domain"]["num_decode"][1] == [0.0, 4.0]
    assert found["accuracy"]["steps"]["mape"] == [profile.accuracy["steps"]["mape"], 0.5]
    assert all(one["ratio"] == pytest.approx(1.25) for one in found["prices"].values())
    assert found["prices"]["step"]["overlap"] is False
    assert found["predictions"]["mean"] == pytest.approx(0.25, abs=1e-6)
    assert found["predictions"]["largest_at"]["num_decode"] <= 4
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = as_text(found)
    for words in (
        "engine: 'vllm 1' -> 'vllm 2'",
        "only old: run 2",
        "intervals apart",
        "+25.0% on average",
        "gap_ns: 0 -> 7",
    ):
        assert words in text


def test_domains_apart_cannot_be_compared(profile: Profile) -> None:
    far = replace(profile, domain={**profile.domain, "num_decode": (1e6, 2e6)})
    with pytest.raises(InputError, match="no batch in common"):
        diff_profiles(profile, far)


def test_profiles_without_prices_are_compared_by_predictions(profile: Profile) -> None:
    linear = {"base_ns": 5_000_000, "per_new_token_ns": 10_000, "per_context_token_ns": 100, "per_req_ns": 0}
    old = Profile(kind="linear", latency=linear)
    new = Profile(kind="linear", latency={name: 2 * price for name, price in linear.items()})
    found = diff_profiles(old, new)
    assert found["prices"] == {}
    assert found["predictions"]["mean"] == pytest.approx(1.0)
    assert "prefill" in found["predictions"]["by_regime"]


def test_damaged_provenance_is_one_line(profile: Profile) -> None:
    with pytest.raises(InputError, match="provenance of a profile is damaged"):
        diff_profiles(profile, replace(profile, provenance={"runs": 5}))


def test_prices_of_models_with_different_features_are_not_compared(profile: Profile) -> None:
    prices = profile.latency["coefficients_ns"]
    fewer = dict(list(prices.items())[:-1])
    gone = (prices.keys() - fewer.keys()).pop()
    free = replace(profile, latency={"coefficients_ns": fewer})
    other = replace(free, provenance={**profile.provenance, "features": "others"})
    found = diff_profiles(profile, other)
    assert found["prices"][gone]["value"] == [prices[gone], None]
    assert all(one["ratio"] is None and one["overlap"] is None for one in found["prices"].values())
    assert found["predictions"]["n"] > 50
    assert "compare predictions" in as_text(found)
    same = diff_profiles(profile, free)  # the same features, of which one costs nothing
    assert same["prices"][gone]["value"] == [prices[gone], 0.0]
    assert same["prices"][gone]["ratio"] == 0
    assert "compare predictions" not in as_text(same)
