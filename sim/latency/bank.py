"""Grids of one operator, one per model shape, on common axes: interpolation along loads, and between shapes where a
batch has one that was not measured.

    time = trend(columns) * ratio(shape, load)        "hybrid": the table corrects the physics
    time = trend(columns) + rest(shape, load)         "corrected": the physics bends the table between its points
    time = value(shape, load)                         "linear": the table alone

Ratios are linear in octaves of the load: octave(x) is the exact, piecewise-linear cousin of log2 (equal at powers of
two), so the numbers are the same on every machine. Beyond the axes' ends a ratio is held, and the trend goes on.
Rests and values are linear in the load itself and go on in a straight line. Between shapes it is the same: ratios in
octaves, rests and values in the sizes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.axis import Axis, FloatArray, Steps, add_corners
from kvtwin.sim.latency.octaves import digits, octave, plain
from kvtwin.sim.latency.work.columns import Columns


def staircase(values: FloatArray, tiles: Sequence[float]) -> FloatArray:
    """Mean over tiles of the load rounded up to whole tiles, and a tenth of the load itself.

    A kernel that works in tiles of 64 rows takes as long for 65 rows as for 128: points on one step lie close together,
    so a value between two points is taken from the one on its own step.

    >>> staircase(np.array([64.0, 65.0, 128.0]), [64.0]).round(6).tolist()
    [64.0, 121.7, 128.0]
    """
    total = np.zeros(len(values))
    for tile in tiles:
        total = total + np.ceil(values / tile) * tile
    return (1.0 - _OWN_SHARE) * (total / len(tiles)) + _OWN_SHARE * values


_OWN_SHARE: Final = 0.1


class ShapeBank:
    """Values on the product of load axes, for each of several model shapes.

    Args:
        shape_names: columns that tell shapes apart; () where there is one shape.
        shapes: array of shape (num_shapes, len(shape_names)).
        axes: load column to its increasing values.
        values: array of shape (num_shapes, len(axis 1), ...), finite.
        octaves: interpolate linearly in octaves and hold the ends; else in the load itself, going on in a straight line.
        steps: load column to the tiles that it fills: such a load is placed on a staircase (`staircase`).
    """

    def __init__(
        self,
        shape_names: Sequence[str],
        shapes: npt.ArrayLike,
        axes: Mapping[str, npt.ArrayLike],
        values: npt.ArrayLike,
        octaves: bool,
        steps: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Raises ValueError where the parts do not fit together."""
        self.shape_names = tuple(shape_names)
        self.shapes = np.asarray(shapes, np.float64)
        self.axes = {name: np.asarray(axis, np.float64) for name, axis in axes.items()}
        self.values = np.asarray(values, np.float64)
        self.octaves = octaves
        self.steps = {name: tuple(float(tile) for tile in tiles) for name, tiles in (steps or {}).items()}
        num_shapes = len(self.shapes) if self.shape_names else 1
        if self.shape_names and self.shapes.shape != (num_shapes, len(self.shape_names)):
            raise ValueError(f"shapes of shape {self.shapes.shape} for {len(self.shape_names)} columns")
        if self.values.shape != (num_shapes, *(len(axis) for axis in self.axes.values())):
            raise ValueError(f"values of shape {self.values.shape} do not fit {num_shapes} shapes and the axes")
        if not np.all(np.isfinite(self.values)):
            raise ValueError("every value must be finite")
        if any(len(axis) == 0 or np.any(np.diff(axis) <= 0) for axis in self.axes.values()):
            raise ValueError("every axis must be strictly increasing and not empty")
        self._cells = {
            name: Axis(self.place(name, axis)) if len(axis) > 1 else None for name, axis in self.axes.items()
        }
        sizes = [len(axis) for axis in self.axes.values()]
        self._strides = [math.prod(sizes[at + 1 :]) for at, size in enumerate(sizes) if size > 1]
        self._log_shapes = octave(self.shapes)
        self._shape_places = self._log_shapes if octaves else self.shapes
        self._shape_rows = self._index_shapes()

    def __call__(self, columns: Columns) -> FloatArray:
        """Values of n batches: float64 of shape (n,)."""
        row, known = self._find(columns)
        if known.all():
            return self._at(row, columns)
        here, there = (
            {name: np.asarray(columns[name], np.float64)[part] for name in (*self.shape_names, *self.axes)}
            for part in (known, ~known)
        )
        result = np.empty(len(row))
        result[known], result[~known] = self._at(row[known], here), self._between_shapes(there)
        return result

    def _at(self, row: npt.NDArray[np.intp], columns: Columns) -> FloatArray:
        """Values of batches whose shapes are the rows of `shapes`."""
        flat = row
        shares = []
        for name, cells in self._cells.items():
            flat = flat * len(self.axes[name])
            if cells is None:
                continue
            cell, share = cells(self.place(name, np.asarray(columns[name], np.float64)))
            flat += cell
            shares.append(np.clip(share, 0.0, 1.0, out=share) if self.octaves else share)
        result = np.zeros(len(row))
        add_corners(result, self.values.ravel(), flat, shares, self._strides)
        return result

    def place(self, name: str, load: FloatArray) -> FloatArray:
        """Coordinate of a load, in which values are linear."""
        if name in self.steps:
            return staircase(load, self.steps[name])
        return octave(load) if self.octaves else load

    def _find(self, columns: Columns) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Row of `shapes` for each batch, and whether there is one."""
        n = len(next(iter(columns.values())))
        if n > 1 and all(np.all(columns[name] == columns[name][0]) for name in self.shape_names):  # as of one model
            one, is_known = self._find({name: columns[name][:1] for name in (*self.shape_names, *self.axes)})
            return np.full(n, one[0]), np.full(n, is_known[0])
        row, known = np.zeros(n, np.intp), np.ones(n, np.bool_)
        for name, (steps, rows) in zip(self.shape_names, self._shape_rows, strict=True):
            column = np.asarray(columns[name], np.float64)
            place = steps(column)
            place -= place > 0
            known &= steps.numbers.take(place) == column
            row = rows.take(row * len(steps.numbers) + place)
            known &= row >= 0
        return row, known

    def _between_shapes(self, columns: Columns) -> FloatArray:
        """Values of batches of unknown shapes: means over the known shapes around each."""
        wanted = np.column_stack([columns[name] for name in self.shape_names])
        different, inverse = np.unique(wanted, axis=0, return_inverse=True)
        rows, weights = (np.array(part) for part in zip(*map(self._around, different), strict=True))
        total = np.zeros(len(wanted))
        for at in range(rows.shape[1]):
            total = total + weights[inverse.ravel(), at] * self._at(rows[inverse.ravel(), at], columns)
        return total

    def _around(self, shape: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
        """Rows of known shapes around an unknown one, and their weights, which add up to 1.

        Along each shape column, the nearest two that enclose it and agree in every other column; of several columns the
        one whose two are closer counts more. Where no column has two: of ratios the nearest shapes, of times the nearest.

        Returns:
            Arrays of shape (2 * number of shape columns,); what is not needed has weight 0.
        """
        rows, weights = np.zeros((len(shape), 2), np.intp), np.zeros((len(shape), 2))
        place = octave(shape) if self.octaves else shape
        for dimension in range(len(shape)):
            along, here = self._shape_places[:, dimension], place[dimension]
            agree = np.delete(self.shapes == shape, dimension, axis=1).all(axis=1)
            low, high = np.flatnonzero(agree & (along < here)), np.flatnonzero(agree & (along > here))
            if len(low) and len(high):
                pair = low[along[low].argmax()], high[along[high].argmin()]
                before, after = here - along[pair[0]], along[pair[1]] - here
                rows[dimension] = pair
                weights[dimension] = np.array([after, before]) / (before + after) ** 2
        if not weights.any():
            distance = ((self._log_shapes - octave(shape)) ** 2).sum(axis=1)
            near = np.argsort(distance, kind="stable")[: rows.size if self.octaves else 1]
            rows.flat[: len(near)], weights.flat[: len(near)] = near, 1.0 / distance[near]
        return rows.ravel(), weights.ravel() / weights.sum()

    def _index_shapes(self) -> list[tuple[Steps, npt.NDArray[np.intp]]]:
        """For each shape column its values, and which row (after the last column: of `shapes`) they lead to.

        The second is an array of shape (rows so far, values): -1 where no shape goes on like this.
        """
        found, row, so_far = [], np.zeros(len(self.shapes), np.intp), 1
        for dimension in range(len(self.shape_names)):
            values, place = np.unique(self.shapes[:, dimension], return_inverse=True)
            rows = np.full((so_far, len(values)), -1, np.intp)
            last = dimension == len(self.shape_names) - 1
            pairs, after = np.unique(row * len(values) + place.ravel(), return_inverse=True)
            after = np.arange(len(self.shapes)) if last else after.ravel()
            rows[row, place.ravel()] = after
            found.append((Steps(values), rows))
            row, so_far = after, len(pairs)
        return found

    def knows(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which batches lie inside: a known shape, every load within its axis."""
        n = len(next(iter(columns.values())))
        inside = np.ones(n, np.bool_)
        for name, axis in self.axes.items():
            values = np.asarray(columns[name], np.float64)
            inside &= (values >= axis[0]) & (values <= axis[-1])
        return inside & self.knows_shapes(columns)

    def knows_shapes(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which batches have a known shape."""
        return self._find(columns)[1]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShapeBank:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        return cls(
            data["shape_names"], data["shapes"], data["axes"], data["values"], bool(data["octaves"]), data["steps"]
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only; values to six digits."""
        return {
            "shape_names": list(self.shape_names),
            "shapes": [[plain(value) for value in row] for row in self.shapes.tolist()],
            "axes": {name: [plain(value) for value in axis.tolist()] for name, axis in self.axes.items()},
            "values": digits(self.values).tolist(),
            "octaves": self.octaves,
            "steps": {name: list(tiles) for name, tiles in self.steps.items()},
        }
