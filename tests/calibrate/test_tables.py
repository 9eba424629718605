"""Tables of operator times to profiles: whole values are left out, noise is known, bad tables are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.tables.calibrate import calibrate_tables, fit_samples
from kvtwin.calibrate.tables.checks import prepare
from kvtwin.calibrate.tables.choice import choose, floor_of
from kvtwin.calibrate.tables.holdout import folds, hold_out
from kvtwin.calibrate.tables.judge import judge_table
from kvtwin.calibrate.tables.scale import fit_scales, scale_profile
from kvtwin.calibrate.tables.suspects import faster_than_smallest, stands_out
from kvtwin.sim.latency.profile import read_profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

Samples = Callable[..., OpSamples]
Table = Callable[..., OpTable]
Axes = Callable[..., dict[str, npt.NDArray[Any]]]


def test_bilinear_times_are_interpolated_exactly_and_simply(decode: Samples) -> None:
    samples = decode()
    held = hold_out(samples, None)
    inside = held.inside
    assert inside.any() and not inside.all()
    error = np.abs(held.predicted["linear"] / samples.time_us[held.row] - 1)
    assert error[inside].max() < 1e-9
    assert choose(samples, held).name == "trend"  # exact as well, and simpler


def test_a_fold_leaves_out_whole_values_that_are_no_neighbours(decode: Samples) -> None:
    samples = decode()
    for fold in folds(samples):
        left_out = np.unique(samples.load[fold.axis][fold.left_out])
        assert not np.isin(samples.load[fold.axis][~fold.left_out], left_out).any()
        places = np.searchsorted(np.unique(samples.load[fold.axis]), left_out)
        assert np.all(np.diff(places) > 1)
    for axis in samples.load:
        counts = np.sum([fold.left_out for fold in folds(samples) if fold.axis == axis], axis=0)
        assert np.all(counts == 1)


def test_a_leak_of_held_out_rows_would_show(decode: Samples) -> None:
    """A spike on one whole value cannot be predicted by a model that has not seen that value."""
    samples = decode()
    spike = samples.load["context"] == 1024
    samples = replace(samples, time_us=np.where(spike, 10 * samples.time_us, samples.time_us))
    held = hold_out(samples, None)
    rows = held.part("context", True) & spike[held.row]
    for name, predicted in held.predicted.items():
        assert np.all(np.abs(predicted[rows] / samples.time_us[held.row[rows]] - 1) > 0.5), name


def test_errors_state_the_planted_noise(decode: Samples) -> None:
    fitted = fit_samples(decode(noise=0.03, seed=1), None)
    error = np.abs(fitted.held.predicted[fitted.choice.name] / fitted.samples.time_us[fitted.held.row] - 1)
    assert 0.015 < error[fitted.held.inside].mean() < 0.05  # E|x| of the noise is 2.4 %


def test_noise_floor_from_spread_and_from_repeats(samples_of: Samples, decode: Samples) -> None:
    samples = decode()
    known = replace(samples, spread=np.full(len(samples), 0.02))
    assert floor_of(known) == pytest.approx(0.02 * np.sqrt(2 / np.pi))
    assert floor_of(samples) is None
    load = {name: np.repeat(values, 40) for name, values in samples.load.items()}
    rng = np.random.default_rng(0)
    repeated = samples_of(
        "decode_attention", load, np.repeat(samples.time_us, 40) * rng.normal(1, 0.01, 40 * len(samples))
    )
    assert floor_of(repeated) == pytest.approx(0.01 * np.sqrt(2 / np.pi), rel=0.1)


def test_a_timer_that_counts_in_steps_is_found_and_is_noise(samples_of: Samples, table_of: Table) -> None:
    rng = np.random.default_rng(0)
    true = 5.0 + 55.0 * rng.random(600)
    load = {"num_tokens": np.arange(1, 601)}
    for step in (0.0, 1.024, 2.048):
        counted = np.floor(true / step) * step + 0.2 if step else true
        (sample,) = prepare(table_of(samples_of("tokens", load, counted))).samples
        assert sample.resolution_us == step
        floor = floor_of(sample)
        if step:
            assert floor == pytest.approx(step / 4 * np.mean(1 / counted), rel=0.1)
        else:
            assert floor is None


def test_a_profile_survives_its_file_and_keys_stay_apart(tmp_path: Path, table_of: Table, gemm: Samples) -> None:
    slow = replace(gemm(scale=2.0), key={"version": "1.0", "dtype": "fp32"})
    fast = replace(gemm(), key={"version": "1.0", "dtype": "bf16"})
    profile = calibrate_tables([table_of(slow, fast, hardware="X", engine="vllm")])
    assert (profile.kind, profile.hardware, profile.engine) == ("operators", "X", "vllm 1.0")
    profile.write(tmp_path / "profile.json")
    found = read_profile(tmp_path / "profile.json").operators()
    for samples in (slow, fast):
        model = found.find("gemm", {"dtype": samples.key["dtype"]})
        assert model.time_us(samples.columns) == pytest.approx(samples.time_us, rel=1e-3)
    with pytest.raises(InputError, match="2 models of 'gemm'"):
        found.find("gemm")
    with pytest.raises(InputError, match="a simulation needs whole steps"):
        profile.latency_model()
    again = calibrate_tables([table_of(slow, fast, hardware="X", engine="vllm")])
    assert again.to_json() == profile.to_json()


def test_a_test_table_only_judges(table_of: Table, decode: Samples) -> None:
    samples = decode()
    profile = calibrate_tables([table_of(samples)])
    slower = table_of(replace(samples, time_us=samples.time_us * 1.25))
    judged = judge_table(profile, slower)
    found = judged.accuracy["decode_attention, on table.csv"]
    assert found["bias"] == pytest.approx(-0.2, abs=1e-3)
    assert judged.latency == profile.latency
    with pytest.raises(InputError, match="no operator of the profile"):
        judge_table(profile, table_of(replace(samples, key={"version": "2.0"})))


def test_two_engine_versions_are_refused_with_the_remedy(table_of: Table, decode: Samples) -> None:
    two = table_of(decode(), replace(decode(), key={"version": "2.0"}))
    with pytest.raises(InputError, match=r"2 engine versions \(1.0, 2.0\).*--filter version=2.0"):
        calibrate_tables([two])
    assert calibrate_tables([two.only({"version": "2.0"})]).engine == "2.0"


def test_too_few_rows_are_refused(table_of: Table, decode: Samples) -> None:
    with pytest.raises(InputError, match="7 rows of one operator under one key at most: 8 or more"):
        calibrate_tables([table_of(decode().where(np.arange(7)))])


@pytest.mark.parametrize(
    ("factor", "remedy"), [(1e3, "divide the times by 1000"), (1e-3, "multiply the times by 1000")]
)
def test_a_wrong_unit_is_refused(factor: float, remedy: str, table_of: Table, gemm: Samples, decode: Samples) -> None:
    for samples in (gemm(), decode()):
        table = table_of(replace(samples, time_us=samples.time_us * factor))
        with pytest.raises(InputError, match=f"unit looks wrong.*{remedy}"):
            prepare(table)


def test_an_operator_that_reads_a_gigabyte_of_weights_is_no_wrong_unit(samples_of: Samples, table_of: Table) -> None:
    tokens = np.arange(1.0, 40.0)
    head = samples_of("tokens", {"num_tokens": tokens}, 680 + tokens)
    assert len(prepare(table_of(head)).samples) == 1
    with pytest.raises(InputError, match="divide the times by 1000"):
        prepare(table_of(replace(head, time_us=1000 * head.time_us)))


@pytest.mark.parametrize("row", [0, 1, 57, 99])
@pytest.mark.parametrize("factor", [1e-3, 100.0, 1e300])
def test_a_row_in_another_unit_is_suspect_and_its_neighbours_are_not(
    row: int, factor: float, samples_of: Samples
) -> None:
    """Times grow by up to the square of a load; ends of a line and corners of a grid count as well."""
    num_decode, context = (
        values.ravel() for values in np.meshgrid([1, 2, 4, 8, 16, 32, 64, 96, 128, 256], np.geomspace(64, 4096, 10))
    )
    time_us = 4.0 + 1e-4 * num_decode * context
    samples = samples_of("decode_attention", {"num_decode": num_decode, "context": context}, time_us)
    assert not stands_out(samples).any()
    time_us = np.where(np.arange(100) == row, factor * time_us, time_us)
    assert np.flatnonzero(stands_out(replace(samples, time_us=time_us))).tolist() == [row]


def test_copied_rows_are_no_repeats(samples_of: Samples) -> None:
    tokens = np.arange(1.0, 40.0).repeat(2)
    assert floor_of(samples_of("tokens", {"num_tokens": tokens}, 5 + tokens)) is None


def test_rows_faster_than_the_smallest_batch_are_named_not_fitted(table_of: Table, decode: Samples) -> None:
    samples = decode()
    broken = (samples.load["num_decode"] >= 32) & (samples.load["context"] <= 256)
    samples = replace(samples, time_us=np.where(broken, 3.0, samples.time_us))
    assert np.array_equal(faster_than_smallest(samples), broken)
    profile = calibrate_tables([table_of(samples)])
    (entry,) = profile.provenance["suspect_rows"].values()
    assert entry == {"count": 4, "rows": np.flatnonzero(broken).tolist()}
    model = profile.operators().find("decode_attention")
    columns = {"num_decode": np.array([32]), "context": np.array([256])}
    assert model.time_us(columns)[0] == pytest.approx(6.0 + 2e-3 * 32 * 256, rel=0.02)


def test_a_planted_scale_comes_back_from_few_samples() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(5, 5000, 30)
    op = np.zeros(30, np.int64)
    truths: list[Callable[[Any], Any]] = [lambda r: 0.4 * r, lambda r: 3.0 + 0.4 * r]
    for truth in truths:
        _, (scale,) = fit_scales(reference, truth(reference), op, 1)
        grid = np.linspace(5, 5000, 50)
        assert scale.apply(grid) == pytest.approx(truth(grid), rel=0.01)
    law, _ = fit_scales(reference, 0.4 * reference, op, 1)
    assert law == "factor"


def test_scaling_predicts_a_faster_gpu_and_says_how_well(
    tmp_path: Path, table_of: Table, gemm: Samples, decode: Samples
) -> None:
    reference = calibrate_tables([table_of(gemm(), hardware="old", engine="vllm")])
    new = replace(gemm(), time_us=2.0 + 0.3 * gemm().time_us, key={"version": "2.0"})
    profile = scale_profile(table_of(new, hardware="new"), reference, num_samples=10, seed=0, hardware=None)
    found = profile.accuracy["all operators, not sampled"]
    assert found["n"] == len(new) - 10
    assert found["mape"] < 0.02
    assert len(profile.provenance["sampled_rows"]) == 10
    assert [entry["samples"] for entry in profile.provenance["learning"]] == [10, 30]
    profile.write(tmp_path / "new.json")
    model = read_profile(tmp_path / "new.json").operators().find("gemm")
    assert model.time_us(new.columns) == pytest.approx(new.time_us, rel=0.05)
    with pytest.raises(InputError, match="--samples 68: 2 to 59 of this table's 68 rows"):
        scale_profile(table_of(new), reference, num_samples=68, seed=0, hardware=None)
    with pytest.raises(InputError, match="none of these operators is in the reference, which has gemm"):
        scale_profile(table_of(decode()), reference, num_samples=10, seed=0, hardware=None)
