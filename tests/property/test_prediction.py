"""Fast predictions are the plain ones, bit for bit: cells found without a search, rows that repeat, parts of a table."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.calibrate.tables.candidates import fit_all
from kvtwin.sim.latency.axis import Steps
from kvtwin.sim.latency.bank import ShapeBank, staircase
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.operators import Scale
from kvtwin.sim.latency.repeats import distinct, numbered, rows_of
from kvtwin.sim.latency.surface import Part, Surface
from kvtwin.traces.readers.optable import OpSamples, plain_samples

positive = st.floats(0, 1e12, exclude_min=True)
RNG_SEEDS = st.integers(0, 2**32 - 1)


@given(st.lists(st.one_of(positive, st.integers(1, 40).map(float)), max_size=60, unique=True), st.lists(positive))
def test_steps_that_values_have_reached_are_those_of_a_binary_search(numbers: list[float], others: list[float]) -> None:
    known = np.array(sorted(numbers))
    near = np.concatenate([known, np.nextafter(known, 0.0), np.nextafter(known, np.inf), others, [0.0, 1e300, np.inf]])
    values = np.resize(near, max(len(near), 100))
    assert Steps(known)(values).tolist() == known.searchsorted(values, side="right").tolist()


def between(points: npt.NDArray[np.float64], value: float) -> tuple[int, float]:
    """Cell and share of one value, as the textbook has them."""
    cell = min(max(bisect_right(points.tolist(), value) - 1, 0), len(points) - 2)
    return cell, (value - points.item(cell)) / (points.item(cell + 1) - points.item(cell))


@given(RNG_SEEDS, st.booleans(), st.booleans())
def test_a_bank_is_the_sum_over_the_corners_of_a_cell(seed: int, octaves: bool, tiled: bool) -> None:
    rng = np.random.default_rng(seed)
    axes = {name: np.unique(rng.integers(0, 5000, rng.integers(2, 9))).astype(np.float64) for name in "abc"}
    axes["fixed"] = np.array([7.0])
    shapes = np.array([[1.0, 2.0], [1.0, 4.0], [3.0, 4.0]])
    values = rng.normal(1.0, 0.3, (3, *(len(axis) for axis in axes.values())))
    steps = {"a": [64.0, 128.0]} if tiled else {}
    bank = ShapeBank(("x", "y"), shapes, axes, values, octaves, steps)
    columns = {name: rng.integers(0, 6000, 100).astype(np.float64) for name in axes}
    shape = rng.integers(0, 3, 100)
    found = bank(columns | {"x": shapes[shape, 0], "y": shapes[shape, 1]})

    def place(name: str, load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if name in steps:
            return staircase(load, steps[name])
        return octave(load) if octaves else load

    points = {name: place(name, axis) for name, axis in axes.items() if len(axis) > 1}
    for row in range(100):
        cells = [between(axis, place(name, columns[name]).item(row)) for name, axis in points.items()]
        shares = [min(max(share, 0.0), 1.0) if octaves else share for _, share in cells]
        total = 0.0
        for corner in itertools.product((0, 1), repeat=len(cells)):
            weight = math.prod((share if side else 1.0 - share for side, share in zip(corner, shares, strict=True)))
            at = tuple(cell + side for side, (cell, _) in zip(corner, cells, strict=True))
            total += weight * values[(shape[row], *at, 0)].item()
        assert found[row] == total


@given(RNG_SEEDS, st.booleans())
def test_a_surface_is_one_and_the_sum_of_its_parts(seed: int, whole_octaves: bool) -> None:
    rng = np.random.default_rng(seed)
    axes = {
        name: np.arange(2.0, 2.0 + rng.integers(2, 9)) if whole_octaves else np.unique(rng.uniform(0, 12, 5))
        for name in "ab"
    }
    parts = [
        Part(names, rng.normal(0.0, 0.2, tuple(len(axes[name]) for name in names)))
        for names in [("a",), ("b",), ("a", "b"), ("b", "a")]
    ]
    columns = {name: rng.integers(0, 5000, 100).astype(np.float64) for name in axes}
    found = Surface(axes, parts)(columns)
    for row in range(100):
        inside = {name: min(max(octave(columns[name]).item(row), axes[name][0]), axes[name][-1]) for name in axes}
        cells = {name: between(axes[name], value) for name, value in inside.items()}
        total = 1.0
        for part in parts:
            for corner in itertools.product((0, 1), repeat=len(part.names)):
                sides = dict(zip(part.names, reversed(corner), strict=True))
                weight = math.prod(cells[name][1] if side else 1.0 - cells[name][1] for name, side in sides.items())
                total += weight * part.values[tuple(cells[name][0] + side for name, side in sides.items())].item()
        assert found[row] == max(total, 0.1)


def measured(work: str, load: dict[str, list[int]], shapes: dict[str, list[int]]) -> OpSamples:
    """A table of every load and shape, with times that are nothing but noise."""
    axes = {
        name: axis.ravel() for name, axis in zip(load | shapes, np.meshgrid(*(load | shapes).values()), strict=True)
    }
    times = np.random.default_rng(0).uniform(5.0, 50.0, len(next(iter(axes.values()))))
    samples = plain_samples(work, work, {name: axes[name] for name in load}, times)
    return replace(samples, shape={name: axes[name] for name in shapes})


PRODUCTS = measured("gemm", {"m": [1, 2, 7, 16, 33, 64, 128, 500]}, {"n": [512, 1024, 2048], "k": [512, 4096, 6144]})
DECODES = measured(
    "decode_attention",
    {"num_decode": [1, 2, 8, 64], "context": [16, 100, 1024, 9000]},
    {"num_heads": [16, 32], "num_key_value_heads": [2, 4, 8]},
)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("samples", [PRODUCTS, DECODES], ids=["gemm", "decode_attention"])
def test_a_batch_takes_as_long_among_thousands_as_alone(samples: OpSamples, repeated: bool) -> None:
    rng = np.random.default_rng(0)
    most = 25 if repeated else 100_000
    columns = {name: rng.integers(1, most, 20_000).astype(np.float64) for name in samples.load}
    columns |= {
        name: rng.choice([*np.unique(values), 48.0], 20_000) for name, values in samples.shape.items()
    }  # 48: not measured
    assert (distinct(columns) is not None) == repeated
    for candidate in fit_all(samples, [132.0]):
        for model in (candidate.to_model(), candidate.to_model().scaled(Scale(1.0, 1.1, 0.1, 20.0))):
            parts = [{name: values[at : at + 40] for name, values in columns.items()} for at in range(0, 2000, 40)]
            alone = np.concatenate([model.time_us(part) for part in parts])
            assert np.array_equal(model.time_us(columns)[:2000], alone), candidate.name


@given(
    st.lists(st.tuples(st.integers(-3, 5), st.sampled_from([0.5, 1.0, 2.0, 7.0])), min_size=1, max_size=200),
    st.booleans(),
)
def test_distinct_rows_are_the_rows(rows: list[tuple[int, float]], whole: bool) -> None:
    first, second = (np.array(values) for values in zip(*rows, strict=True))
    columns = {"first": first, "second": np.rint(second) if whole else second}
    found = distinct(columns)
    if found is not None:
        different, places = found
        assert len({*zip(*(values.tolist() for values in different.values()), strict=True)}) == different["first"].size
        assert all(np.array_equal(values[places], columns[name]) for name, values in different.items())


@given(st.lists(st.tuples(st.integers(-9, 40), st.sampled_from([0.5, 1.0, 2.0, 9e15])), min_size=1, max_size=200))
def test_rows_are_numbered_in_their_order(rows: list[tuple[int, float]]) -> None:
    columns = [np.array(values) for values in zip(*rows, strict=True)]
    for values in columns:
        found, places = np.unique(values, return_inverse=True)
        assert [numbers.tolist() for numbers in numbered(values)] == [found.tolist(), places.tolist()]
    different, numbers = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    where, places = rows_of(map(numbered, columns))
    assert np.array_equal(np.column_stack(columns)[where], different) and places.tolist() == numbers.ravel().tolist()
