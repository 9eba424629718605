"""Models of operator times: planted truths come back, spikes stay where they are, damaged numbers are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.steps.regression import NotFittedError
from kvtwin.calibrate.tables.calibrate import fit_samples
from kvtwin.calibrate.tables.candidates import (
    Calm,
    Corrected,
    Forested,
    Hybrid,
    Linear,
    Pooled,
    Smooth,
    Surfaced,
    Trend,
    fit_all,
)
from kvtwin.calibrate.tables.checks import prepare
from kvtwin.calibrate.tables.fill import fill_bank
from kvtwin.calibrate.tables.prices import relative_nnls
from kvtwin.sim.latency.bank import ShapeBank, staircase
from kvtwin.sim.latency.forest import Forest
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.operators import OperatorModel, OperatorTable
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.surface import Surface
from kvtwin.sim.latency.work.terms import trend
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

Samples = Callable[..., OpSamples]
Table = Callable[..., OpTable]
Axes = Callable[..., dict[str, npt.NDArray[Any]]]


def test_waves_and_tiles_of_a_planted_kernel_come_back(gemm: Samples) -> None:
    found = Trend([100.0, 150.0]).fit(gemm())
    assert (found.to_model().tile, found.to_model().slots) == (64.0, 100.0)
    columns = {"m": np.array([65, 129, 1000]), "n": np.full(3, 4096), "k": np.full(3, 4096)}
    truth = 3.0 + 0.01 * np.ceil(np.ceil(columns["m"] / 64) * 32 / 100) * 4096
    assert found.time_us(columns) == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("kind", [Linear, Trend, Hybrid, Corrected, Smooth])
def test_a_candidate_learns_only_in_fit_and_twice_is_once(kind: type, decode: Samples) -> None:
    candidate = kind()
    with pytest.raises(NotFittedError):
        candidate.to_model()
    samples = decode()
    once = candidate.fit(samples).time_us(samples.columns)
    assert np.array_equal(kind().fit(samples).fit(samples).time_us(samples.columns), once)


def test_every_table_model_gives_its_own_points_back(decode: Samples) -> None:
    samples = decode(noise=0.05)
    for fitted in fit_all(samples, None):
        if fitted.name in ("trend", "surface") or fitted.name.startswith("calm"):
            continue  # physics and what is smooth on top of it: they pass between the points
        assert fitted.time_us(samples.columns) == pytest.approx(samples.time_us, rel=1e-6), fitted.name


def test_a_bend_along_a_diagonal_is_found_where_its_row_was_left_out(decode: Samples) -> None:
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


def test_a_left_out_number_of_requests_is_known_from_models_with_other_heads(
    samples_of: Samples, product: Axes
) -> None:
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


def test_spikes_of_single_calls_leave_their_neighbours_alone(gemm: Samples, decode: Samples) -> None:
    """One call in twelve takes three times as long, whatever its sizes: the others are predicted all the same."""
    for samples in (gemm(sizes=(512, 1024, 1536, 2048, 4096, 8192)), decode()):
        spikes = np.random.default_rng(3).random(len(samples)) < 1 / 12
        noisy = replace(samples, time_us=samples.time_us * np.where(spikes, 3.0, 1.0))
        base = Trend([100.0]).fit(noisy)
        learnt = Forested(base).fit(noisy) if samples.work == "gemm" else Surfaced(base).fit(noisy)
        error = np.abs(learnt.time_us(samples.columns) / samples.time_us - 1)[~spikes].mean()
        assert error < 0.02, (samples.work, error)


def test_calmed_ratios_carry_no_spike_to_the_left_out_value_beside_it(gemm: Samples) -> None:
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


def test_a_kernel_chosen_by_size_is_known_where_its_rows_were_left_out(gemm: Samples) -> None:
    """Products with more than a million outputs run another kernel, which starts at another m for every n."""
    samples = gemm(sizes=(512, 1024, 1536, 2048, 3072, 4096, 6144, 8192))
    switched = samples.load["m"] * samples.shape["n"] > 1_000_000
    samples = replace(samples, time_us=samples.time_us * np.where(switched, 1.6, 1.0))
    left_out = samples.load["m"] == 256
    train, test = samples.where(~left_out), samples.where(left_out)
    trend_ = Trend([100.0]).fit(train)
    errors = {
        fitted.name: np.abs(fitted.time_us(test.columns) / test.time_us - 1).mean()
        for fitted in (Hybrid([], trend_).fit(train), Linear((64.0,)).fit(train), Forested(trend_).fit(train))
    }
    assert errors["forest"] < 0.5 * min(errors["hybrid"], errors["linear, tiles of 64"]), errors


def test_a_forest_survives_its_numbers_and_damaged_ones_are_refused(gemm: Samples) -> None:
    samples = gemm(sizes=(1024, 2048, 4096, 8192))
    model = Forested(Trend([100.0]).fit(samples)).fit(samples).to_model()
    again = OperatorModel.from_json(model.to_json())
    assert np.array_equal(again.time_us(samples.columns), model.time_us(samples.columns))
    good = {"names": ["m"], "coordinate": [[0]], "threshold": [[4.0]], "factor": [[0.5, 2.0]]}
    assert Forest.from_json(good)({"m": np.array([4.0, 4.5])}).tolist() == [0.5, 2.0]
    for broken in (
        good | {"coordinate": [[1]]},
        good | {"threshold": [[float("nan")]]},
        good | {"factor": [[0.5, 2.0, 1.0]]},
        good | {"factor": [[0.5, 0.0]]},
        good | {"threshold": [[4.0], [5.0]]},
    ):
        with pytest.raises(ValueError, match=r"tree|split|threshold"):
            Forest.from_json(broken)


def test_a_profile_of_another_version_is_refused_in_one_line(gemm: Samples) -> None:
    samples = gemm()
    data = Trend([100.0]).fit(samples).to_model().to_json()
    data["surface"] = {"axes": {"small tiles": [1, 2]}, "parts": []}
    with pytest.raises(InputError, match="'small tiles' is not known to this version: calibrate it anew"):
        OperatorModel.from_json(data).time_us(samples.columns)


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


def test_decodes_that_share_a_context_are_priced_by_the_share_of_each(samples_of: Samples, product: Axes) -> None:
    load = product(num_decode=range(1, 49), total_context=range(64, 2049, 64))
    seqs, share = load["num_decode"], np.maximum(load["total_context"] // load["num_decode"], 1)
    rounds = np.ceil(seqs * 32 / 84)  # 32 query heads on 84 multiprocessors
    time_us = 2.0 + rounds * (0.5 + 0.03 * np.ceil(share / 32) * 32)
    heads = {"num_heads": 32.0, "num_key_value_heads": 8.0}
    samples = samples_of("decode_attention", load, time_us, constants=heads)
    fitted = Trend([84.0]).fit(samples)
    assert np.max(np.abs(fitted.time_us(samples.columns) / time_us - 1)) < 0.02


def test_an_unknown_model_on_an_unknown_gpu_is_priced_by_thread_blocks_for_each_head(
    samples_of: Samples, table_of: Table, product: Axes
) -> None:
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


def test_a_bank_finds_the_row_of_a_shape_and_those_around_an_unknown_one() -> None:
    rng = np.random.default_rng(0)
    sizes = [1.0, 2.0, 4.0, 12.0, 40.0]
    shapes = rng.permutation(np.array(list(itertools.product(sizes, sizes))))
    value = octave(shapes) @ [1.0, 2.0]
    bank = ShapeBank(("a", "b"), shapes, {"m": [1.0]}, value[:, None], octaves=True)

    def at(wanted: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        return {"m": np.ones(len(wanted)), "a": wanted[:, 0], "b": wanted[:, 1]}

    assert np.array_equal(bank(at(shapes)), value)
    for enclosed in ([3.0, 12.0], [4.0, 30.0]):  # along one column
        assert bank(at(np.array([enclosed]))) == pytest.approx(octave(enclosed) @ [1.0, 2.0])
    hole = np.flatnonzero((shapes == [4.0, 12.0]).all(axis=1))  # enclosed along both columns
    rest = ShapeBank(
        ("a", "b"), np.delete(shapes, hole, 0), {"m": [1.0]}, np.delete(value, hole)[:, None], octaves=True
    )
    assert rest(at(shapes[hole])) == pytest.approx(value[hole])
    apart = np.array([[3.0, 30.0], [42.0, 41.0], [0.5, 4.5]])  # nothing agrees in one column: the nearest shapes
    assert bank(at(apart)) == pytest.approx(octave(apart) @ [1.0, 2.0], abs=1.5)
    mixed = np.concatenate([shapes, apart])
    assert bank.knows(at(mixed)).tolist() == [True] * len(shapes) + [False] * len(apart)
    assert np.array_equal(bank(at(mixed)), np.concatenate([value, bank(at(apart))]))


def test_a_time_does_not_depend_on_its_neighbours_in_the_call(decode: Samples) -> None:
    samples = decode(noise=0.02)
    model = Hybrid().fit(samples).to_model()
    columns = {name: np.tile(values, 400) for name, values in samples.columns.items()}  # more than one chunk
    alone = np.concatenate(
        [model.time_us({name: v[i : i + 1] for name, v in samples.columns.items()}) for i in range(49)]
    )
    assert np.array_equal(model.time_us(columns), np.tile(alone, 400))


def test_an_unknown_shape_lies_between_the_known_ones_and_is_flagged(gemm: Samples) -> None:
    model = Linear().fit(gemm()).to_model()
    columns = {"m": np.array([64, 64, 64, 9000]), "n": np.array([1024, 2560, 4096, 4096]), "k": np.full(4, 4096)}
    times = model.time_us(columns)
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    assert model.bank is not None
    assert model.bank.knows(columns).tolist() == [True, False, True, False]


def test_a_table_alone_leaves_unknown_shapes_to_physics(product: Axes, samples_of: Samples) -> None:
    """Times of known sizes are linear in m, but with m's weight no multiple of anything: the table is the best model."""
    columns = product(m=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32], n=[256, 1024, 4096], k=[256, 1024, 4096])
    each = columns["n"] * columns["k"]
    time_us = 5.0 + 1e-4 * each * (1.0 + 0.02 * np.sin(columns["n"] + columns["k"]) * columns["m"])
    shape = {"n": columns["n"], "k": columns["k"]}
    samples = samples_of("gemm", {"m": columns["m"]}, time_us, shape=shape)
    fitted = fit_samples(samples, None)
    assert fitted.choice.name == "linear"
    assert fitted.elsewhere is not None
    model = OperatorModel.from_json(fitted.model.to_json())
    assert model.elsewhere is not None
    wanted = {"m": np.full(3, 8.0), "n": np.array([1024.0, 16384.0, 1024.0]), "k": np.array([1024.0, 2048.0, 4096.0])}
    times = model.time_us(wanted)
    assert times[[0, 2]] == pytest.approx(Linear().fit(samples).time_us(wanted)[[0, 2]], rel=1e-5)
    assert times[1] == model.elsewhere.time_us(wanted)[1] != Linear().fit(samples).time_us(wanted)[1]


def test_damaged_banks_are_refused(decode: Samples) -> None:
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


def test_operators_are_found_by_name(decode: Samples) -> None:
    operators = OperatorTable([Linear().fit(decode()).to_model()])
    with pytest.raises(InputError, match="0 models of 'gemm'"):
        operators.find("gemm")
