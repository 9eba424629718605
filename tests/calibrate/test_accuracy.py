from __future__ import annotations

import json

import numpy as np
import pytest

from kvtwin.calibrate.accuracy import summarize


def test_values_by_hand() -> None:
    found = summarize([100, 200, 400, 400, 100], [110, 180, 400, 400, 120])
    assert (found["n"], found["mape"], found["bias"]) == (5, pytest.approx(0.08), pytest.approx(0.04))
    assert [found[q] for q in ("p50", "p90", "p99")] == pytest.approx([0.1, 0.16, 0.196])


def test_the_interval_holds_the_mape_and_the_document_is_json() -> None:
    rng = np.random.default_rng(0)
    measured = rng.lognormal(size=300)
    found = summarize(measured, measured * rng.normal(1, 0.1, 300))
    low, high = found["interval"]
    assert low < found["mape"] < high
    assert high - low < 0.02
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_whole_groups_are_drawn() -> None:
    """Ten groups of 100 equal errors are evidence of ten rows, not of a thousand."""
    rng = np.random.default_rng(0)
    error = np.repeat(rng.uniform(0, 0.2, 10), 100)
    order = rng.permutation(1000)  # shuffled, so that neighbours tell nothing and only the labels can
    labels = np.repeat(np.array(list("abcdefghij")), 100)
    measured = np.full(1000, 50.0)
    grouped = summarize(measured, measured * (1 + error[order]), groups=labels[order])["interval"]
    single = summarize(measured, measured * (1 + error[order]))["interval"]
    ten = summarize(measured[:10], measured[:10] * (1 + error[::100]), groups=np.arange(10))["interval"]
    assert grouped[1] - grouped[0] > 5 * (single[1] - single[0])
    assert grouped == pytest.approx(ten)


def test_groups_of_unequal_size_count_by_their_rows() -> None:
    measured, labels = np.full(60, 10.0), np.repeat(np.arange(6), [1, 3, 6, 10, 15, 25])
    predicted = measured * (1.0 + 0.01 * labels)
    found = summarize(measured, predicted, groups=labels)
    assert found["mape"] == pytest.approx(0.01 * np.mean(labels))
    assert found["interval"][0] < found["mape"] < found["interval"][1]


def test_too_few_to_say_how_sure() -> None:
    assert summarize([1, 2, 3, 4], [1, 2, 3, 5])["interval"] is None
    assert summarize(np.ones(100), np.ones(100), groups=np.arange(100) % 4)["interval"] is None
    assert summarize([], []) == {"n": 0, **dict.fromkeys(("mape", "interval", "bias", "p50", "p90", "p99"))}


@pytest.mark.parametrize(("measured", "predicted"), [(0, 1), (-1, 1), (1, np.nan), (np.nan, 1), (1, np.inf)])
def test_errors_without_meaning_are_refused(measured: float, predicted: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        summarize([measured], [predicted])
