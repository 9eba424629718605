"""Tables on the loads of samples: averages of repeats, holes filled along the axes, axes refined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.bank import ShapeBank
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.repeats import numbered, rows_of

_MIN_RATIO: Final = 1e-6


def fill_bank(
    shape: Mapping[str, npt.NDArray[Any]],
    load: Mapping[str, npt.NDArray[Any]],
    values: FloatArray,
    *,
    octaves: bool,
    steps: Mapping[str, Sequence[float]] | None = None,
    weights: FloatArray | None = None,
) -> ShapeBank:
    """Values on the union of the load axes, for each shape; repeats averaged by `weights`, holes filled along the axes.

    Holes are interpolated along the last axis first, then along the others; what lies outside on every axis takes the
    nearest known value of its line (ratios) or goes on in a straight line (times).
    """
    names = tuple(shape)
    shapes, group = np.zeros((1, 0)), np.zeros(len(values), np.intp)
    if names:
        where, group = rows_of(map(numbered, shape.values()))
        shapes = np.column_stack([column[where] for column in shape.values()]).astype(np.float64)
    places, axes = [group], {}
    for name, column in load.items():
        axis, place = numbered(column)
        axes[name] = axis.astype(np.float64)
        places.append(place)
    size = (len(shapes), *(len(axis) for axis in axes.values()))
    flat = np.ravel_multi_index(tuple(places), size)
    weight = np.ones(len(values)) if weights is None else weights
    count = np.bincount(flat, weights=weight, minlength=int(np.prod(size))).reshape(size)
    total = np.bincount(flat, weights=weight * values, minlength=int(np.prod(size))).reshape(size)
    table = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    empty = ShapeBank(names, shapes, axes, np.zeros(size), octaves, steps)
    coordinates = [empty.place(name, axis) for name, axis in axes.items()]
    for beyond in (None, "hold" if octaves else "straight"):
        for dimension in reversed(range(1, table.ndim)):
            table = _filled_along(table, dimension, coordinates[dimension - 1], beyond)
    return ShapeBank(names, shapes, axes, table, octaves, steps)


def _filled_along(table: FloatArray, dimension: int, axis: FloatArray, beyond: str | None) -> FloatArray:
    """Fill holes between known values of each line; with `beyond`, also outside them."""
    lines = np.moveaxis(table, dimension, -1)
    known = ~np.isnan(lines)
    fillable = known.any(axis=-1) & ~known.all(axis=-1)
    if fillable.any():
        lines = lines.copy()
        lines[fillable] = _filled_lines(lines[fillable], known[fillable], axis, beyond)
    result: FloatArray = np.moveaxis(lines, -1, dimension)
    return result


def _filled_lines(lines: FloatArray, known: npt.NDArray[np.bool_], axis: FloatArray, beyond: str | None) -> FloatArray:
    """Lines of shape (m, size), each with a hole and a known value at least."""
    size = lines.shape[-1]
    place, rows = np.arange(size), np.arange(len(lines))[:, None]
    before = np.maximum.accumulate(np.where(known, place, -1), axis=-1)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(known, place, size), -1), axis=-1), -1)
    low, high = np.maximum(before, 0), np.minimum(after, size - 1)
    at_low, at_high = lines[rows, low], lines[rows, high]
    gap = axis[high] - axis[low]
    share = np.divide(axis[place] - axis[low], gap, out=np.zeros(lines.shape), where=gap > 0)
    inside = at_low + (at_high - at_low) * share
    filled = np.where(known, lines, np.where((before >= 0) & (after < size), inside, np.nan))
    if beyond is not None:
        filled = np.where(np.isnan(filled) & (before >= 0), at_low, filled)
        filled = np.where(np.isnan(filled) & (after < size), at_high, filled)
        if beyond == "straight":
            filled = _straight(lines, filled, known, axis)
    return filled


def _straight(lines: FloatArray, filled: FloatArray, known: npt.NDArray[np.bool_], axis: FloatArray) -> FloatArray:
    """Go on beyond the last two known values of each line; a line with fewer keeps its one value."""
    size = lines.shape[-1]
    place = np.broadcast_to(np.arange(size), lines.shape)
    out = filled
    for flip in (False, True):
        mask = np.flip(known, -1) if flip else known
        values = np.flip(lines, -1) if flip else lines
        where = axis[::-1] if flip else axis
        last = np.where(mask, place, -1).max(axis=-1, keepdims=True)
        earlier = np.where(mask & (place < last), place, -1).max(axis=-1, keepdims=True)
        near, far = np.clip(last, 0, None), np.clip(earlier, 0, None)
        at_near, at_far = np.take_along_axis(values, near, -1), np.take_along_axis(values, far, -1)
        gap = where[near] - where[far]
        slope = np.divide(at_near - at_far, gap, out=np.zeros(gap.shape), where=(gap != 0) & (earlier >= 0))
        beyond = at_near + slope * (where - where[near])
        goes_on = (place > last) & (earlier >= 0)
        if flip:
            beyond, goes_on = np.flip(beyond, -1), np.flip(goes_on, -1)
        out = np.where(goes_on, beyond, out)
    return out


def refined(bank: ShapeBank) -> ShapeBank:
    """Three midpoints in each cell of each axis, from a monotone cubic of the log-ratios (Fritsch & Carlson 1980)."""
    from scipy.interpolate import PchipInterpolator

    axes, values = dict(bank.axes), np.log(np.maximum(bank.values, _MIN_RATIO))
    for dimension, (name, axis) in enumerate(bank.axes.items(), start=1):
        if len(axis) < 4:
            continue
        between = np.concatenate([axis[:-1] + (axis[1:] - axis[:-1]) * part for part in (0.25, 0.5, 0.75)])
        # Loads are counts: whole numbers only.
        finer = np.unique(np.concatenate([axis, np.floor(between), np.floor(np.sqrt(axis[:-1] * axis[1:]))]))
        values = PchipInterpolator(octave(axis), values, axis=dimension)(octave(finer))
        axes[name] = finer
    return ShapeBank(bank.shape_names, bank.shapes, axes, np.exp(values), octaves=True)
