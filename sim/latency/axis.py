"""Where values lie among increasing numbers: what a binary search finds, several times quicker.

Interpolation spends most of its time on the search for the cell that a value lies in: each of its steps is a branch that
a processor cannot foresee. But positive floats are ordered as the integers that their bits spell (IEEE 754), so the
leading bits name a bucket, a table knows how many numbers lie before each bucket, and a comparison settles the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_Places = npt.NDArray[np.intp]

_FEW: Final = 64  # values that a binary search has found before a table is looked into
_MOST_BUCKETS: Final = 1 << 14
_MOST_COMPARISONS: Final = 4
_SHIFTS: Final = range(52, 36, -1)  # bits of a float64 that do not name the bucket


class Steps:
    """How many of some increasing numbers each value has reached: `numbers.searchsorted(values, side="right")`.

    >>> Steps(np.array([1.0, 2.0, 4.0]))(np.array([0.0, 2.0, 9.0])).tolist()
    [0, 2, 3]
    """

    def __init__(self, numbers: FloatArray) -> None:
        self.numbers = numbers

    def __call__(self, values: npt.NDArray[Any]) -> _Places:
        """Places of n values: array of shape (n,)."""
        if len(values) < _FEW or self._buckets is None:
            return self.numbers.searchsorted(values, side="right")
        shift, first, before, comparisons = self._buckets
        exact = np.asarray(values, np.float64)
        bucket = exact.view(np.int64) >> shift
        bucket -= first
        found = before.take(bucket, mode="clip")
        for _ in range(comparisons):
            found += exact >= self._then_never.take(found)
        return found

    @cached_property
    def _then_never(self) -> FloatArray:
        return np.append(self.numbers, np.nan)

    @cached_property
    def _buckets(self) -> tuple[int, int, _Places, int] | None:
        """Bits to drop, the first bucket, how many numbers lie before each, and most numbers in one; None: search."""
        if not len(self.numbers) or not self.numbers[0] > 0.0:
            return None
        bits, best = self.numbers.view(np.int64), None
        for shift in _SHIFTS:
            bucket = bits >> shift
            if bucket[-1] - bucket[0] + 3 > _MOST_BUCKETS:
                break
            inside = np.bincount(bucket - bucket[0] + 1, minlength=int(bucket[-1] - bucket[0]) + 3)
            best = shift, int(bucket[0]) - 1, inside.cumsum() - inside, int(inside.max())
            if best[-1] == 1:
                break
        return best if best is not None and best[-1] <= _MOST_COMPARISONS else None


class Axis:
    """Strictly increasing points, two at least, and the cells between them."""

    def __init__(self, points: FloatArray) -> None:
        self.points = points
        self._steps = Steps(points[1:-1])
        widths = np.diff(points)
        self._widths = None if np.all(widths == 1.0) else widths

    def __call__(self, values: npt.NDArray[Any]) -> tuple[_Places, FloatArray]:
        """Of n values: the cell of each, the first and last of which have no outer end, and the share of the way through.

        Returns:
            Two arrays of shape (n,); a share is below 0 or above 1 beyond the ends.
        """
        cell = self._steps(values)
        share = values - self.points.take(cell)
        if self._widths is not None:
            share /= self._widths.take(cell)
        return cell, share


def add_corners(
    total: FloatArray, table: FloatArray, lowest: _Places, shares: Sequence[FloatArray], strides: Sequence[int]
) -> None:
    """Add to `total` what lies between the corners of each value's cell, corner by corner, the last axis in turn first.

    Args:
        total, lowest: arrays of shape (n,); the place of each cell's lowest corner in `table`, which is flat.
        shares: of the way through the cell, along each axis: arrays of shape (n,).
        strides: how far apart the two ends of a cell lie in `table`, along each axis.
    """
    if not shares:
        total += table.take(lowest)
        return
    corner = np.empty(len(total))
    for weight, offset in corners(shares, strides):
        table[offset:].take(lowest, out=corner, mode="clip")  # nothing is clipped: any mode but "raise" is quicker
        corner *= weight
        total += corner


def corners(shares: Sequence[FloatArray], strides: Sequence[int]) -> Iterator[tuple[FloatArray, int]]:
    """Weight of each corner of a cell, of shape (n,), and how far from the lowest corner it lies (`add_corners`); a share at least."""
    weights: list[FloatArray] = []
    offsets = [0]
    for share, stride in zip(shares, strides, strict=True):
        sides = (1.0 - share, share)
        weights = [weight * side for weight in weights for side in sides] if weights else list(sides)
        offsets = [offset + step for offset in offsets for step in (0, stride)]
    yield from zip(weights, offsets, strict=True)
