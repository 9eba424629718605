"""What a trend misses, smooth in physical coordinates: factor = 1 + sum over parts of part(coordinates).

A part is a table over one or two coordinates (`coordinates.py`: keys, thread blocks, queries ...), linear in octaves
between its points and held beyond them. A bend at some number of bytes lies on a diagonal of the table of loads, where
interpolation along the loads cannot find it. Only +, -, *, / and comparisons, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.axis import Axis, FloatArray, add_corners
from kvtwin.sim.latency.octaves import digits, octave, plain
from kvtwin.sim.latency.work.columns import Columns

_MIN_FACTOR: Final = 0.1

# Of n batches along one coordinate: index of the cell, and share of the way through it.
Cells = tuple[npt.NDArray[np.intp], FloatArray]


@dataclass(frozen=True)
class Part:
    """Values over one or two coordinates: array of shape (points of each)."""

    names: tuple[str, ...]
    values: FloatArray


class Surface:
    """Factors on a trend.

    Args:
        axes: coordinate to its increasing points, in octaves; two at least.
        parts: tables over them.
    """

    def __init__(self, axes: Mapping[str, npt.ArrayLike], parts: Sequence[Part]) -> None:
        """Raises ValueError where the parts do not fit together."""
        self.axes = {name: np.asarray(axis, np.float64) for name, axis in axes.items()}
        self.names = tuple(self.axes)
        self.parts = list(parts)
        if any(len(axis) < 2 or np.any(np.diff(axis) <= 0) for axis in self.axes.values()):
            raise ValueError("every axis must have two points and be strictly increasing")
        self._cells = {name: Axis(axis) for name, axis in self.axes.items()}
        for part in self.parts:
            if part.values.shape != tuple(len(self.axes[name]) for name in part.names):
                raise ValueError(f"values of shape {part.values.shape} do not fit the axes {', '.join(part.names)}")
            if not np.all(np.isfinite(part.values)):
                raise ValueError("every value must be finite")

    def __call__(self, found: Columns) -> FloatArray:
        """Factors of n batches from their coordinates: float64 of shape (n,)."""
        cells = {name: cell(axis, found[name]) for name, axis in self._cells.items()}
        total = np.ones(len(next(iter(found.values()))))
        for part in self.parts:
            lowest, shares, strides = place_of([cells[name] for name in part.names], part.values.shape)
            add_corners(total, part.values.ravel(), lowest, shares, strides)
        return np.maximum(total, _MIN_FACTOR)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Surface:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        parts = [Part(tuple(part["names"]), np.asarray(part["values"], np.float64)) for part in data["parts"]]
        return cls(data["axes"], parts)

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only; values to six digits."""
        return {
            "axes": {name: [plain(value) for value in axis.tolist()] for name, axis in self.axes.items()},
            "parts": [{"names": list(part.names), "values": digits(part.values).tolist()} for part in self.parts],
        }


def cell(axis: Axis, values: FloatArray) -> Cells:
    """Index of the point at or below each value, in octaves, and the share of the way to the next one (0 to 1)."""
    where = octave(values)
    return axis(np.clip(where, axis.points[0], axis.points[-1], out=where))


def place_of(cells: Sequence[Cells], shape: Sequence[int]) -> tuple[npt.NDArray[np.intp], list[FloatArray], list[int]]:
    """Where batches lie in a part's flattened table: lowest corners, shares and strides of `corners`, last axis first."""
    lowest, shares, strides, stride = np.zeros(len(cells[0][0]), np.intp), [], [], 1
    for (low, share), size in zip(reversed(cells), reversed(shape), strict=True):
        lowest += low * stride
        shares.append(share)
        strides.append(stride)
        stride *= size
    return lowest, shares, strides


# By `OpSamples.work`: the pairs of coordinates that have a table together.
PAIRS: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "decode_attention": (
        ("blocks", "context"), ("num_decode", "context"), ("queries", "keys"), ("context", "queries"),
        ("kv_heads", "num_decode"), ("kv_heads", "context"),
    ),
    "prefill_attention": (
        ("blocks", "chunk"), ("num_seqs", "chunk"), ("kv_heads", "chunk"), ("kv_heads", "num_seqs"), ("chunk", "prefix"),
    ),
    "mixed_attention": (
        ("num_decode", "keys"), ("num_decode", "chunk"), ("context", "num_decode"), ("keys", "pairs"),
        ("num_decode", "pairs"),
    ),
}  # fmt: skip
