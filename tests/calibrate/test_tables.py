"""Tables of operator times to models: planted truths come back, whole values are left out, bad tables are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.steps.regression import NotFittedError
from kvtwin.calibrate.tables.calibrate import calibrate_tables, fit_samples
from kvtwin.calibrate.tables.candidates import (
    Calm,
    Corrected,
    Hybrid,
    Linear,
    Pooled,
    Smooth,
    Surfaced,
    Trend,
    fit_all,
    relative_nnls,
)
from kvtwin.calibrate.tables.checks import faster_than_smallest, prepare
from kvtwin.calibrate.tables.choice import choose, floor_of
from kvtwin.calibrate.tables.fill import fill_bank
from kvtwin.calibrate.tables.holdout import folds, hold_out
from kvtwin.calibrate.tables.judge import judge_table
from kvtwin.calibrate.tables.scale import fit_scales, scale_profile
from kvtwin.sim.latency.bank import ShapeBank, staircase
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.operators import OperatorModel, OperatorTable
from kvtwin.sim.latency.profile import Profile, read_profile
from kvtwin.sim.latency.surface import Surface
from kvtwin.sim.latency.work import trend
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

SIZES = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024]


def samples_of(
    work: str, load: dict[str, npt.NDArray[Any]], time_us: npt.NDArray[np.float64], **fields: Any
) -> OpSamples:
    n = len(time_us)
    defaults: dict[str, Any] = {
        "op": work, "key": {"version": "1.0"}, "shape": {}, "rows": np.arange(n), "spread": np.full(n, np.nan),
        "suspect": np.zeros(n, np.bool_),
    }  # fmt: skip
    return OpSamples(work=work, load=load, time_us=time_us, **(defaults | fields))


def table_of(*samples: OpSamples, **facts: str) -> OpTable:
    return OpTable(Path("table.csv"), "planted", samples, {"reader": "planted"}, facts)


def product(**axes: Sequence[float]) -> dict[str, npt.NDArray[Any]]:
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(axes, grids, strict=True)}


def gemm(scale: float = 1.0) -> OpSamples:
    """A kernel of 64 x 128 tiles on 100 slots: 3 us, and 0.01 us per wave and element of depth."""
    columns = product(m=SIZES, n=[1024, 4096], k=[1024, 4096])
    blocks = np.ceil(columns["m"] / 64) * np.ceil(columns["n"] / 128)
    time_us = scale * (3.0 + 0.01 * np.ceil(blocks / 100) * columns["k"])
    return samples_of("gemm", {"m": columns["m"]}, time_us, shape={"n": columns["n"], "k": columns["k"]})


def decode(noise: float = 0.0, seed: int = 0) -> OpSamples:
    load = product(num_decode=[1, 2, 4, 8, 16, 32, 64], context=[128, 256, 512, 1024, 2048, 4096, 8192])
    time_us = 6.0 + 2e-3 * load["num_decode"] * load["context"]
    time_us = time_us * (1 + noise * np.random.default_rng(seed).standard_normal(len(time_us)))
    return samples_of("decode_attention", load, time_us)


def test_waves_and_tiles_of_a_planted_kernel_come_back() -> None:
    found = Trend([100.0, 150.0]).fit(gemm())
    assert (found.to_model().tile, found.to_model().slots) == (64.0, 100.0)
    columns = {"m": np.array([65, 129, 1000]), "n": np.full(3, 4096), "k": np.full(3, 4096)}
    truth = 3.0 + 0.01 * np.ceil(np.ceil(columns["m"] / 64) * 32 / 100) * 4096
    assert found.time_us(columns) == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("kind", [Linear, Trend, Hybrid, Corrected, Smooth])
def test_a_candidate_learns_only_in_fit_and_twice_is_once(kind: type) -> None:
    candidate = kind()
    with pytest.raises(NotFittedError):
        candidate.to_model()
    samples = decode()
    once = candidate.fit(samples).time_us(samples.columns)
    assert np.array_equal(kind().fit(samples).fit(samples).time_us(samples.columns), once)


def test_every_table_model_gives_its_own_points_back() -> None:
    samples = decode(noise=0.05)
    for fitted in fit_all(samples, None):
        if fitted.name in ("trend", "surface") or fitted.name.startswith("calm"):
            continue  # physics and what is smooth on top of it: they pass between the points
        assert fitted.time_us(samples.columns) == pytest.approx(samples.time_us, rel=1e-6), fitted.name


def test_a_bend_along_a_diagonal_is_found_where_its_row_was_left_out() -> None:
    """Time per key jumps where the keys no longer fit a cache: at 16 decodes, a context that was measured with others."""
    samples = decode()
    keys = samples.load["num_decode"] * samples.load["context"]
    samples = replace(samples, time_us=samples.time_us * np.where(keys >= 40_000, 2.0, 1.0))
    left_out = samples.load["num_decode"] == 16
    train, test = samples.where(~left_out), samples.where(left_out)
    trend_ = Trend([]).fit(train)
    errors = {
        fitted.name: np.abs(fitted.time_us(test.columns) / test.time_us - 1).mean()
        for fitted in (Linear().fit(train), Hybrid([], Surfaced(trend_).fit(train)).fit(train))
    }
    assert errors["hybrid on surface"] < 0.75 * errors["linear"], errors


def test_a_left_out_number_of_requests_is_known_from_models_with_other_heads() -> None:
    columns = product(num_key_value_heads=[2, 4, 8], num_decode=[1, 2, 4, 8, 16, 32], context=[256, 1024, 4096])
    blocks = columns["num_key_value_heads"] * columns["num_decode"]
    time_us = 5.0 + blocks * columns["context"] * 1e-3 + 9.0 * np.sin(blocks)  # nothing that interpolation could guess
    heads = {"num_heads": 4 * columns["num_key_value_heads"], "num_key_value_heads": columns.pop("num_key_value_heads")}
    samples = samples_of("decode_attention", columns, time_us + 10.0, shape=heads)
    left_out = samples.load["num_decode"] == 8
    train, test = samples.where(~left_out), samples.where(left_out & (heads["num_key_value_heads"] == 4))
    pool = Pooled(Trend([]).fit(train)).fit(train)
    assert pool.time_us(test.columns) == pytest.approx(test.time_us, rel=1e-6)
    assert pool.to_model().to_json() == OperatorModel.from_json(pool.to_model().to_json()).to_json()


def test_spikes_of_single_calls_leave_their_neighbours_alone() -> None:
    """One call in twelve takes three times as long, whatever m, n and k: the others are predicted all the same."""
    samples = gemm()
    spikes = np.random.default_rng(3).random(len(samples)) < 1 / 12
    noisy = replace(samples, time_us=samples.time_us * np.where(spikes, 3.0, 1.0))
    surface = Surfaced(Trend([100.0]).fit(noisy)).fit(noisy)
    error = {
        fitted.name: np.abs(fitted.time_us(samples.columns) / samples.time_us - 1)[~spikes].mean()
        for fitted in (surface, Calm(base=surface).fit(noisy))
    }
    assert max(error.values()) < 0.01, error  # by least squares 0.015 and 0.016


def test_calmed_ratios_carry_no_spike_to_the_left_out_value_beside_it() -> None:
    samples = gemm()
    shape = (samples.shape["n"] == 4096) & (samples.shape["k"] == 4096)
    spike = shape & (samples.load["m"] == 96)
    left_out = samples.load["m"] == 128
    train = replace(samples, time_us=np.where(spike, 3.0, 1.0) * samples.time_us).where(~left_out)
    test = samples.where(left_out & shape)
    trend_ = Trend([100.0]).fit(train)  # of a whole table: one spike hardly moves its prices
    beside = trend_.time_us(test.columns)
    calm, hybrid = (kind(base=trend_).fit(train).time_us(test.columns) / beside for kind in (Calm, Hybrid))
    assert calm == pytest.approx(1.0, abs=0.02)
    assert hybrid[0] > 1.3


def test_damaged_surfaces_are_refused() -> None:
    good = {"axes": {"keys": [1, 2]}, "parts": [{"names": ["keys"], "values": [0.1, 0.2]}]}
    assert Surface.from_json(good)({"keys": np.array([1.0, 3.0])}) == pytest.approx([1.1, 1.2])
    for broken in (
        good | {"axes": {"keys": [1]}},
        good | {"axes": {"keys": [2, 1]}},
        good | {"parts": [{"names": ["keys"], "values": [0.1]}]},
        good | {"parts": [{"names": ["keys"], "values": [0.1, float("nan")]}]},
    ):
        with pytest.raises(ValueError, match=r"axis|value"):
            Surface.from_json(broken)


def test_bilinear_times_are_interpolated_exactly_and_simply() -> None:
    samples = decode()
    held = hold_out(samples, None)
    inside = held.inside
    assert inside.any() and not inside.all()
    error = np.abs(held.predicted["linear"] / samples.time_us[held.row] - 1)
    assert error[inside].max() < 1e-9
    assert choose(samples, held).name == "trend"  # exact as well, and simpler


def test_a_fold_leaves_out_whole_values_that_are_no_neighbours() -> None:
    samples = decode()
    for fold in folds(samples):
        left_out = np.unique(samples.load[fold.axis][fold.left_out])
        assert not np.isin(samples.load[fold.axis][~fold.left_out], left_out).any()
        places = np.searchsorted(np.unique(samples.load[fold.axis]), left_out)
        assert np.all(np.diff(places) > 1)
    for axis in samples.load:
        counts = np.sum([fold.left_out for fold in folds(samples) if fold.axis == axis], axis=0)
        assert np.all(counts == 1)


def test_a_leak_of_held_out_rows_would_show() -> None:
    """A spike on one whole value cannot be predicted by a model that has not seen that value."""
    samples = decode()
    spike = samples.load["context"] == 1024
    samples = replace(samples, time_us=np.where(spike, 10 * samples.time_us, samples.time_us))
    held = hold_out(samples, None)
    rows = held.part("context", True) & spike[held.row]
    for name, predicted in held.predicted.items():
        assert np.all(np.abs(predicted[rows] / samples.time_us[held.row[rows]] - 1) > 0.5), name


def test_errors_state_the_planted_noise() -> None:
    fitted = fit_samples(decode(noise=0.03, seed=1), None)
    error = np.abs(fitted.held.predicted[fitted.choice.name] / fitted.samples.time_us[fitted.held.row] - 1)
    assert 0.015 < error[fitted.held.inside].mean() < 0.05  # E|x| of the noise is 2.4 %


def test_noise_floor_from_spread_and_from_repeats() -> None:
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


def test_holes_of_a_bank_are_filled_along_its_axes() -> None:
    load = {"num_decode": np.array([1, 1, 3, 3, 5]), "context": np.array([0, 20, 0, 10, 0])}
    values = np.array([10.0, 30.0, 30.0, 40.0, 50.0])  # 10 + 10 (d - 1) + c
    bank = fill_bank({}, load, values, octaves=False)
    truth = 10.0 + 10.0 * (np.array([1, 3, 5])[:, None] - 1) + np.array([0.0, 10.0, 20.0])
    assert bank.values[0, :2] == pytest.approx(truth[:2])
    assert bank.values[0, 2, 0] == 50.0


def test_octaves_and_staircases_are_monotone() -> None:
    x = np.arange(0.0, 3000.0)
    assert np.all(np.diff(octave(x)) > 0)
    assert octave(2.0 ** np.arange(12) - 1).tolist() == list(range(12))
    for tiles in ((64.0,), (64.0, 128.0)):
        assert np.all(np.diff(staircase(x, tiles)) > 0)
    jump = np.diff(staircase(x, [64.0]))
    assert jump[64] > 50 * jump[63]


def test_decodes_that_share_a_context_are_priced_by_the_share_of_each() -> None:
    load = product(num_decode=range(1, 49), total_context=range(64, 2049, 64))
    seqs, share = load["num_decode"], np.maximum(load["total_context"] // load["num_decode"], 1)
    rounds = np.ceil(seqs * 32 / 84)  # 32 query heads on 84 multiprocessors
    time_us = 2.0 + rounds * (0.5 + 0.03 * np.ceil(share / 32) * 32)
    heads = {"num_heads": 32.0, "num_key_value_heads": 8.0}
    samples = samples_of("decode_attention", load, time_us, constants=heads)
    fitted = Trend([84.0]).fit(samples)
    assert np.max(np.abs(fitted.time_us(samples.columns) / time_us - 1)) < 0.02


def test_an_unknown_model_on_an_unknown_gpu_is_priced_by_thread_blocks_for_each_head() -> None:
    """16 query heads in groups of four on 132 multiprocessors, of which the table says nothing."""
    load = product(
        chunk=[64, 256, 1024], prefix=[0, 512, 4096], num_decode=[1, 2, 4, 8, 16, 32], context=[64, 1024, 8192]
    )
    heads = {"num_heads": 16.0, "num_key_value_heads": 4.0}
    columns = {name: values.astype(float) for name, values in load.items()}
    columns |= {name: np.full(len(load["chunk"]), value) for name, value in heads.items()}
    time_us = trend("mixed_attention", columns, {"call": 3.0, "second end": 0.02, "waves": 1.5}, 64.0, 132.0)
    (sample,) = prepare(table_of(samples_of("mixed_attention", load, time_us))).samples
    fitted = Trend().fit(sample)
    assert fitted.model_.slots == 4 * 132  # for four times the heads
    assert fitted.time_us(sample.columns) == pytest.approx(time_us, rel=0.02)


def test_work_that_no_row_shows_gets_no_price() -> None:
    found = {"call": np.ones(40), "rows": np.arange(1.0, 41.0), "several": np.zeros(40)}
    prices = relative_nnls(found, 3.0 + 0.5 * found["rows"])
    assert prices == pytest.approx({"call": 3.0, "rows": 0.5}, rel=1e-6)


def test_a_timer_that_counts_in_steps_is_found_and_is_noise() -> None:
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


def test_a_bank_finds_the_row_of_a_shape_and_the_nearest_of_an_unknown_one() -> None:
    rng = np.random.default_rng(0)
    shapes = np.unique(rng.choice([1.0, 2.0, 4.0, 12.0, 40.0], size=(12, 3)), axis=0)
    shapes = shapes[rng.permutation(len(shapes))]
    names, value = ("a", "b", "c"), np.arange(float(len(shapes)))
    bank = ShapeBank(names, shapes, {"m": [1.0]}, value[:, None], octaves=True)
    wanted = np.concatenate([shapes, rng.choice([1.0, 3.0, 4.0, 12.0, 50.0], size=(200, 3))])
    columns = {"m": np.ones(len(wanted))} | {name: wanted[:, at] for at, name in enumerate(names)}
    nearest = [int(np.argmin(((octave(shapes) - place) ** 2).sum(axis=1))) for place in octave(wanted)]
    assert bank(columns).tolist() == nearest
    assert bank.knows(columns).tolist() == [bool((shapes == row).all(axis=1).any()) for row in wanted]


# ---- profiles ------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file_and_keys_stay_apart(tmp_path: Path) -> None:
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


def test_a_time_does_not_depend_on_its_neighbours_in_the_call() -> None:
    samples = decode(noise=0.02)
    model = Hybrid().fit(samples).to_model()
    columns = {name: np.tile(values, 400) for name, values in samples.columns.items()}  # more than one chunk
    alone = np.concatenate(
        [model.time_us({name: v[i : i + 1] for name, v in samples.columns.items()}) for i in range(49)]
    )
    assert np.array_equal(model.time_us(columns), np.tile(alone, 400))


def test_an_unknown_shape_takes_the_nearest_and_is_flagged() -> None:
    model = Linear().fit(gemm()).to_model()
    columns = {"m": np.array([64, 64, 9000]), "n": np.array([4096, 5000, 4096]), "k": np.full(3, 4096)}
    times = model.time_us(columns)
    assert times[0] == times[1]
    assert model.bank is not None
    assert model.bank.knows(columns).tolist() == [True, False, False]


def test_damaged_banks_are_refused() -> None:
    data = Linear().fit(decode()).to_model().to_json()
    spoils: list[Callable[[Any], Any]] = [
        lambda bank: bank["axes"].update(context=[1, 1, 2, 3, 4, 5, 6]),
        lambda bank: bank.update(values=[[[1.0]]]),
        lambda bank: bank["values"][0][0].__setitem__(0, float("nan")),
    ]
    for spoil in spoils:
        bank = OperatorModel.from_json(data).to_json()
        spoil(bank["bank"])
        profile = Profile(kind="operators", latency={"models": [bank]})
        with pytest.raises(InputError, match="is damaged"):
            profile.operators()


def test_a_test_table_only_judges() -> None:
    samples = decode()
    profile = calibrate_tables([table_of(samples)])
    slower = table_of(replace(samples, time_us=samples.time_us * 1.25))
    judged = judge_table(profile, slower)
    found = judged.accuracy["decode_attention, on table.csv"]
    assert found["bias"] == pytest.approx(-0.2, abs=1e-3)
    assert judged.latency == profile.latency
    with pytest.raises(InputError, match="no operator of the profile"):
        judge_table(profile, table_of(replace(samples, key={"version": "2.0"})))


# ---- refusals ------------------------------------------------------------------------------------------------


def test_two_engine_versions_are_refused_with_the_remedy() -> None:
    two = table_of(decode(), replace(decode(), key={"version": "2.0"}))
    with pytest.raises(InputError, match=r"2 engine versions \(1.0, 2.0\).*--filter version=2.0"):
        calibrate_tables([two])
    assert calibrate_tables([two.only({"version": "2.0"})]).engine == "2.0"


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="7 rows of one operator under one key at most: 8 or more"):
        calibrate_tables([table_of(decode().where(np.arange(7)))])


@pytest.mark.parametrize(
    ("factor", "remedy"), [(1e3, "divide the times by 1000"), (1e-3, "multiply the times by 1000")]
)
@pytest.mark.parametrize("samples", [gemm(), decode()], ids=["gemm", "decode"])
def test_a_wrong_unit_is_refused(samples: OpSamples, factor: float, remedy: str) -> None:
    table = table_of(replace(samples, time_us=samples.time_us * factor))
    with pytest.raises(InputError, match=f"unit looks wrong.*{remedy}"):
        prepare(table)


def test_rows_faster_than_the_smallest_batch_are_named_not_fitted() -> None:
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


# ---- unseen hardware -----------------------------------------------------------------------------------------


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


def test_scaling_predicts_a_faster_gpu_and_says_how_well(tmp_path: Path) -> None:
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


def test_operators_are_found_by_name() -> None:
    operators = OperatorTable([Linear().fit(decode()).to_model()])
    with pytest.raises(InputError, match="0 models of 'gemm'"):
        operators.find("gemm")
