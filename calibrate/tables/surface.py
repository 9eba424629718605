"""Samples -> `sim.latency.surface.Surface`: penalised least relative errors, robust against rows that are spikes.

minimise mean over rows of |predicted / measured - 1| + strength * roughness

Predictions are trend * (1 + sum of parts), linear in the parts' values, so linear systems are solved: least squares,
reweighted by one over each row's last error (iteratively reweighted least squares, Holland & Welsch 1977). Roughness is
the sum of squared second differences along each axis of each part (P-splines, Eilers & Marx 1996), and a little of the
values themselves, which tells parts apart that say the same and keeps what no row shows at the trend.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.axis import Axis, corners
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.surface import PAIRS, Part, Surface, cell, place_of

_STRENGTH: Final = 2e-4  # of a table that is smooth on the scale of octaves: errors of 1 %, bends of as much
_RIDGE: Final = {1: 1e-3, 2: 1e-2}  # by number of coordinates of a part
_NUM_REWEIGHTS: Final = 1  # two more change left-out errors by 0.3 percentage points at most, and take their time
_SMALL_ERROR: Final = 0.03  # rows nearer than this count alike
_LEAST_SPAN: Final = 0.5  # octaves: a coordinate that spans less is a constant


def fit_surface(work: str, coordinates: Mapping[str, FloatArray], ratio: FloatArray) -> Surface:
    """The surface of n rows.

    Args:
        work: entry of `PAIRS`.
        coordinates: arrays of shape (n,).
        ratio: the trend's time over the measured one, shape (n,).
    """
    from scipy import sparse

    axes = {name: _whole_octaves(values) for name, values in coordinates.items() if _spans(values)}
    names: list[tuple[str, ...]] = [(name,) for name in axes]
    names += [pair for pair in PAIRS[work] if all(name in axes for name in pair)]
    shapes = [tuple(len(axes[name]) for name in part) for part in names]
    design = _design(axes, names, shapes, coordinates).multiply(ratio[:, None]).tocsr()
    rough = _STRENGTH * len(ratio) * sparse.block_diag([_roughness(shape) for shape in shapes], format="coo")
    values = _penalised(design, 1.0 - ratio, rough, np.ones(len(ratio)))
    for _ in range(_NUM_REWEIGHTS):
        weights = 1.0 / np.maximum(np.abs(design @ values + ratio - 1.0), _SMALL_ERROR)
        values = _penalised(design, 1.0 - ratio, rough, weights / weights.mean())
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    tables = np.split(values, ends[:-1])
    return Surface(
        axes, [Part(part, table.reshape(shape)) for part, table, shape in zip(names, tables, shapes, strict=True)]
    )


def _penalised(design: Any, target: FloatArray, rough: Any, weights: FloatArray) -> FloatArray:
    """The values that minimise sum of weights * (design @ values - target)^2 + values' rough values."""
    from scipy.linalg import cho_factor, cho_solve

    weighted = design.multiply(weights[:, None]).tocsr()
    normal = (design.T @ weighted).toarray(order="F")  # the rest in place: it is the largest array of a calibration
    normal[rough.row, rough.col] += rough.data
    factor = cho_factor(normal, overwrite_a=True, check_finite=False)
    found: FloatArray = cho_solve(factor, weighted.T @ target, check_finite=False)
    return found


def _spans(values: FloatArray) -> bool:
    return bool(np.ptp(octave(values)) >= _LEAST_SPAN)


def _whole_octaves(values: FloatArray) -> FloatArray:
    place = octave(values)
    found: FloatArray = np.arange(np.floor(place.min()), np.ceil(place.max()) + 1.0)
    return found


def _design(
    axes: Mapping[str, FloatArray],
    names: list[tuple[str, ...]],
    shapes: list[tuple[int, ...]],
    coordinates: Mapping[str, FloatArray],
) -> Any:
    """Sparse matrix of shape (n, number of values): what each value adds to each row's factor."""
    from scipy import sparse

    cells = {name: cell(Axis(axis), coordinates[name]) for name, axis in axes.items()}
    points, weights, first = [], [], 0
    for part, shape in zip(names, shapes, strict=True):
        lowest, shares, strides = place_of([cells[name] for name in part], shape)
        for share, offset in corners(shares, strides):
            points.append(lowest + (first + offset))
            weights.append(share)
        first += int(np.prod(shape))
    place, weight = np.column_stack(points), np.column_stack(weights)
    starts = np.arange(0, place.size + 1, place.shape[1])
    return sparse.csr_matrix((weight.ravel(), place.ravel(), starts), shape=(len(place), first))


@lru_cache(maxsize=256)
def _roughness(shape: tuple[int, ...]) -> Any:
    """Squared second differences along each axis, and the ridge. Folds of a hold-out ask for few shapes again and again."""
    from scipy import sparse

    total = _RIDGE[len(shape)] * sparse.eye(int(np.prod(shape)))
    for axis, size in enumerate(shape):
        if size > 2:
            bend = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(size - 2, size))
            before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
            total = total + sparse.kron(sparse.kron(sparse.eye(before), bend.T @ bend), sparse.eye(after))
    return total
