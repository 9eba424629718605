"""Batches that repeat: of a million, a model with four matrices sees as many thousand times each number of tokens."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.work.columns import Columns

_Places = npt.NDArray[np.intp]
_FIRST_ROWS: Final = 4096  # which tell in a moment of most batches that they do not repeat


def distinct(columns: Columns) -> tuple[dict[str, npt.NDArray[np.float64]], _Places] | None:
    """The distinct rows of n batches, and which of them each batch is: an array of shape (n,).

    None where that may save less than half: where the columns' distinct values have more than n / 2 combinations, hold
    parts of whole numbers, or spread over more than n / 2 whole numbers.
    """
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    n = len(next(iter(arrays.values())))
    if math.prod(len(np.unique(values[: min(n // 8, _FIRST_ROWS)])) for values in arrays.values()) > n // 2:
        return None
    code, size = np.zeros(n, np.intp), 1
    for values in arrays.values():
        found = _codes(values, n // 2)
        if found is None or size * found[1] > n // 2:
            return None
        code *= found[1]
        code += found[0]
        size *= found[1]
    places, number = _numbered(code, size)
    row = np.empty(number, np.intp)
    row[places] = np.arange(n)  # any of those that are equal
    return {name: values[row].astype(np.float64) for name, values in arrays.items()}, places


def _codes(values: npt.NDArray[Any], most: int) -> tuple[_Places | int, int] | None:
    """Each value's number among the distinct ones, and how many there are; None where they span more than `most`."""
    low, high = values.min(), values.max()
    if low == high:
        return 0, 1
    if not high - low < most:
        return None
    above = (values - low).astype(np.intp)
    if values.dtype.kind == "f" and not np.array_equal(above + low, values):
        return None
    return _numbered(above, int(high - low) + 1)


def _numbered(codes: _Places, size: int) -> tuple[_Places, int]:
    """Codes below `size`, those that occur numbered from 0 on, and how many occur."""
    occurs = np.zeros(size, np.bool_)
    occurs[codes] = True
    number = np.cumsum(occurs) - 1
    return number.take(codes), int(number[-1]) + 1
