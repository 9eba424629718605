"""What every latency model must keep: add a model, add a line to MODELS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.sim.latency.composed import ComposedLatency
from kvtwin.sim.latency.grid import Grid
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.pricing import VectorPricer, pricer_for
from kvtwin.sim.latency.profile import LATENCY_MODELS, PROFILE_SCHEMA_VERSION, Profile, read_profile
from kvtwin.sim.latency.regression import FEATURES, RegressionLatency
from kvtwin.sim.latency.stats import BatchStats, batch_row
from kvtwin.traces.errors import InputError

COMPOSED = ComposedLatency(
    num_layers=4,
    num_kernels=40,
    launch_gap_us=1.0,
    tokens={"dense": Grid([[1, 64, 2048]], [50.0, 60.0, 2000.0])},
    sequences=Grid([[1, 256]], [20.0, 60.0]),
    decode=Grid([[1, 8, 256], [16, 16384]], [[5.0, 60.0], [8.0, 300.0], [60.0, 9000.0]]),
    prefill=Grid([[16, 2048], [0, 16384]], [[8.0, 300.0], [170.0, 2100.0]]),
    increment=Grid([[16, 2048], [0], [0, 128], [16, 16384]], [[[[0, 0], [90, 9000]]], [[[0, 0], [120, 9000]]]]),
    unevenness_decode=Grid([[4, 64, 256], [0.1, 0.5]], [[0.0, 0.0], [0.017, 0.01], [0.009, 0.004]]),
    unevenness_mixed=Grid([[0.0], [0.0]], [[0.01]]),
    several=Grid([[16, 2048], [1, 128]], [[8.0, 7.0], [170.0, 60.0]]),
)
MODELS: dict[str, Any] = {
    "linear": LinearLatency(1000, 10, 1, 5),
    "regression": RegressionLatency({"step": 2.5e6, "num_tokens": 7.1e4, "prefill_pairs": 28.5}),
    "composed": COMPOSED,
}

members = st.lists(
    st.tuples(st.integers(0, 20_000), st.one_of(st.just(1), st.integers(2, 4096))), min_size=1, max_size=40
)


def batch(pairs: list[tuple[int, int]]) -> BatchStats:
    cache_lens, input_lens = zip(*pairs, strict=True)
    return BatchStats.of_batch(cache_lens, input_lens)


def test_every_model_of_a_profile_is_held_to_the_contract() -> None:
    assert set(MODELS) == set(LATENCY_MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_takes_as_long_among_thousands_as_alone(name: str) -> None:
    rng = np.random.default_rng(0)
    members = [(rng.integers(0, 20_000, 3).tolist(), rng.choice([1, 1, 1, 70, 900], 3).tolist()) for _ in range(500)]
    few = BatchStats(np.array([batch_row(*pairs) for pairs in members], np.int64))
    alone = np.concatenate([MODELS[name].step_ns(few[at : at + 1], 0) for at in range(500)])
    assert np.array_equal(MODELS[name].step_ns(BatchStats(np.tile(few.table, (40, 1))), 0), np.tile(alone, 40))


@pytest.mark.parametrize("name", MODELS)
@given(st.lists(members, min_size=2, max_size=6))
def test_a_batchs_time_is_a_positive_integer_and_its_own(name: str, batches: list[list[tuple[int, int]]]) -> None:
    model = MODELS[name]
    alone = [model.step_ns(batch(pairs), 0) for pairs in batches]
    together = model.step_ns(BatchStats(np.concatenate([batch(pairs).table for pairs in batches])), 0)
    assert together.dtype == np.int64
    assert np.all(together >= 1)
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("name", MODELS)
def test_a_profile_round_trip_changes_no_nanosecond(name: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    Profile(kind=name, latency=MODELS[name].to_json(), hardware="a GPU").write(path)
    model = read_profile(path).latency_model()
    sample = batch([(100, 1), (5000, 1), (0, 700)])
    assert model.step_ns(sample, 0) == MODELS[name].step_ns(sample, 0)
    with pytest.raises(InputError, match="exists already"):
        Profile(kind=name, latency=MODELS[name].to_json()).write(path)


@given(st.lists(members, min_size=1, max_size=8))
def test_statistics_of_a_table_equal_those_of_each_batch(batches: list[list[tuple[int, int]]]) -> None:
    flat = np.array([pair for pairs in batches for pair in pairs], dtype=np.int64)
    offsets = np.cumsum([0, *(len(pairs) for pairs in batches)])[:-1]
    table = BatchStats.of_members(offsets, flat[:, 0], flat[:, 1]).table
    assert np.array_equal(table, np.concatenate([batch(pairs).table for pairs in batches]))


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_a_number_per_batch(name: str) -> None:
    values = FEATURES[name](batch([(3, 1), (7, 5)]))
    assert values.shape == (1,)
    assert values[0] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, f"schema_version is 99; this kvtwin reads {PROFILE_SCHEMA_VERSION}"),
        ({"kind": "oracle"}, "kind is 'oracle'; known: linear, regression, composed"),
        ({"latency": {"base_ns": "soon"}}, "is damaged"),
        ({"latency": [1, 2]}, "is damaged"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"host": {"schedule_ns": 1, "nap_ns": 2}}, "not a profile"),
        ({"domain": {"num_elephants": [0, 1]}}, "not a profile"),
    ],
)
def test_a_damaged_profile_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    good = Profile(kind="linear", latency=MODELS["linear"].to_json()).to_json()
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}', "\x00"])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_profile(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(tmp_path / "absent.json")


def test_uneven_contexts_cost_more_than_even_ones() -> None:
    even = COMPOSED.step_ns(batch([(1000, 1)] * 64), 0)
    uneven = COMPOSED.step_ns(batch([(4000, 1)] + [(952, 1)] * 62 + [(976, 1)]), 0)
    assert uneven > even


def test_parts_add_up_to_the_step() -> None:
    sample = batch([(1000, 1)] * 5 + [(0, 300)])
    assert round(1e3 * sum(float(part[0]) for part in COMPOSED.parts_us(sample).values())) == COMPOSED.step_ns(
        sample, 0
    )


@pytest.mark.parametrize("name", MODELS)
@given(pairs=members)
def test_a_pricer_gives_a_batch_the_models_nanoseconds(name: str, pairs: list[tuple[int, int]]) -> None:
    row = batch_row(*zip(*pairs, strict=True))
    assert pricer_for(MODELS[name]).step_ns(row, 0) == MODELS[name].step_ns(batch(pairs), 0)[0]


@pytest.mark.parametrize("name", [*MODELS, "free", "vectorised"])
@given(
    cache_lens=st.lists(st.integers(0, 20_000), min_size=1, max_size=40),
    most=st.integers(1, 300),
    reached=st.integers(0, 10**12),
    gap_ns=st.sampled_from([0, 30_000]),
)
def test_a_pricer_gives_a_stretch_the_models_nanoseconds(
    name: str, cache_lens: list[int], most: int, reached: int, gap_ns: int
) -> None:
    model = {**MODELS, "free": LinearLatency(0, 0, 1, 0), "vectorised": COMPOSED}[name]
    pricer = VectorPricer(model) if name == "vectorised" else pricer_for(model)
    steps = [batch_row([length + ahead for length in cache_lens], [1] * len(cache_lens)) for ahead in range(most)]
    single = model.step_ns(BatchStats(np.array(steps)), 0)
    num_decode, context, context_sq, context_max = steps[0][:4]
    durations = pricer.stretch(num_decode, context, context_sq, context_max, most, 0)
    known = min(durations.num_steps, most)
    assert known >= 1
    assert durations.list_ns(known).tolist() == single[:known].tolist()
    assert durations.least_ns <= single.min()
    for count in {1, (known + 1) // 2, known}:
        assert durations.total_ns(count) == single[:count].sum()
        assert durations.last_ns(count) == single[count - 1]
    sums = np.cumsum(single[:known] + gap_ns)
    for time_ns in (reached, int(sums[known // 2]), int(sums[known // 2]) + 1, -5):
        count = min(int(np.searchsorted(sums, time_ns)) + 1, known)
        assert durations.reach(time_ns, gap_ns, known) == (count, single[:count].sum())


@given(
    axes=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_grid_at_one_point_is_the_grid_at_many(axes: list[list[int]], data: st.DataObject) -> None:
    axes = [sorted(axis) for axis in axes]
    shape = [len(axis) for axis in axes]
    values = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).normal(0.0, 100.0, shape)
    point = [data.draw(st.floats(-10.0, 60.0)) for _ in axes]
    grid = Grid(axes, values)
    assert grid.at(*point) == grid(*(np.array([coordinate]) for coordinate in point))[0]


def test_a_grid_gives_the_same_bits_one_by_one_and_many_at_once() -> None:
    rng = np.random.default_rng(0)
    grid = Grid([[0, 1, 5], [2, 4], [7], [1, 3, 9, 20]], rng.random((3, 2, 1, 4)))
    points = [rng.uniform(-2, 25, 20_000) for _ in range(4)]
    values = grid(*points)
    for row in (0, 8_191, 8_192, 19_999):
        assert grid.at(*(float(column[row]) for column in points)) == values[row]
    assert np.array_equal(grid(*(column[9_000:9_010] for column in points)), values[9_000:9_010])
    assert Grid([[3.0]], [5.0])(np.zeros(2)).tolist() == [5.0, 5.0]
