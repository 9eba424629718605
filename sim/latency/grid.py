"""Multilinear interpolation on a rectangular grid, with numbers that are the same on every machine.

Only +, -, * and / are used: these are exact to the last bit everywhere (IEEE 754), while logarithms and
powers are not, so a simulation gives the same bytes on any machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.axis import Axis, FloatArray, add_corners

__all__ = ["FloatArray", "Grid"]

_POINTS_AT_ONCE: Final = 8192  # their corners fit the processor's cache


class Grid:
    """Values on the product of strictly increasing axes; linear in each coordinate between grid points.

    Beyond an axis's end the last cell is continued in a straight line; an axis of one point is constant.

    Args:
        axes: one increasing sequence per dimension.
        values: array of shape (len(axes[0]), len(axes[1]), ...).

    >>> float(Grid([[0.0, 10.0], [0.0, 1.0]], [[0.0, 1.0], [10.0, 11.0]])(np.array([5.0]), np.array([0.5]))[0])
    5.5
    """

    def __init__(self, axes: Sequence[Sequence[float]], values: npt.ArrayLike) -> None:
        """Raises ValueError where axes and values do not fit together."""
        self.axes = [np.asarray(axis, dtype=np.float64) for axis in axes]
        self.values: FloatArray = np.asarray(values, dtype=np.float64)
        if self.values.shape != tuple(len(axis) for axis in self.axes):
            raise ValueError(f"values of shape {self.values.shape} on axes of {[len(axis) for axis in self.axes]}")
        if any(len(axis) == 0 or np.any(np.diff(axis) <= 0) for axis in self.axes):
            raise ValueError("every axis must be strictly increasing and not empty")
        if not np.all(np.isfinite(self.values)):
            raise ValueError("every value must be finite")
        strides = [math.prod(self.values.shape[place + 1 :]) for place in range(len(self.axes))]
        self._flat_axes = [(axis.tolist(), stride) for axis, stride in zip(self.axes, strides, strict=True)]
        self._cells = [Axis(axis) if len(axis) > 1 else None for axis in self.axes]
        self._flat_values: list[float] = self.values.ravel().tolist()

    def __call__(self, *coordinates: FloatArray | npt.NDArray[np.int64]) -> FloatArray:
        """Interpolate at n points; one array of shape (n,) per dimension."""
        n = len(coordinates[0])
        result = np.empty(n)
        for start in range(0, n, _POINTS_AT_ONCE):
            part = slice(start, start + _POINTS_AT_ONCE)
            self._interpolate([coordinate[part] for coordinate in coordinates], result[part])
        return result

    def _interpolate(self, coordinates: Sequence[npt.NDArray[Any]], result: FloatArray) -> None:
        """Write the values at the points into `result`: weights and places in the order of `at`."""
        lowest = np.zeros(len(result), dtype=np.intp)
        shares, strides = [], []
        for axis, (_, stride), coordinate in zip(self._cells, self._flat_axes, coordinates, strict=True):
            if axis is None:
                continue
            cell, share = axis(coordinate)
            cell *= stride
            lowest += cell
            shares.append(share)
            strides.append(stride)
        result[:] = 0.0
        add_corners(result, self.values.reshape(-1), lowest, shares, strides)

    def at(self, *coordinates: float) -> float:
        """Interpolate at one point: what a call gives, bit for bit, many times quicker."""
        corners = [(1.0, 0)]  # weight and place in the flat values, in the order of __call__
        for (axis, stride), coordinate in zip(self._flat_axes, coordinates, strict=True):
            if len(axis) == 1:
                continue
            cell = min(max(bisect_right(axis, coordinate) - 1, 0), len(axis) - 2)
            share = (coordinate - axis[cell]) / (axis[cell + 1] - axis[cell])
            low, rest = cell * stride, 1.0 - share
            corners = [
                side
                for weight, place in corners
                for side in ((weight * rest, place + low), (weight * share, place + low + stride))
            ]
        values, result = self._flat_values, 0.0
        for weight, place in corners:
            result += weight * values[place]
        return result
