"""Values and rows that repeat: of a million batches, a model with four matrices sees as many thousand times each m."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.work.columns import Columns

_Places = npt.NDArray[np.intp]
_FIRST_ROWS: Final = 4096  # which tell in a moment of most batches that they do not repeat
_MOST_SPREAD: Final = 16  # whole numbers, for each value, among which values are looked up rather than sorted


def distinct(columns: Columns) -> tuple[dict[str, npt.NDArray[np.float64]], _Places] | None:
    """The distinct rows of n batches, and which of them each batch is: an array of shape (n,).

    None where that may save less than half: where the columns' distinct values have more than n / 2 combinations.
    """
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    n = len(next(iter(arrays.values())))
    if math.prod(len(np.unique(values[: min(n // 8, _FIRST_ROWS)])) for values in arrays.values()) > n // 2:
        return None
    numbers = [numbered(values) for values in arrays.values()]
    if math.prod(len(found) for found, _ in numbers) > n // 2:
        return None
    first, places = rows_of(numbers)
    return {name: values[first].astype(np.float64) for name, values in arrays.items()}, places


def rows_of(columns: Iterable[tuple[npt.NDArray[Any], _Places]]) -> tuple[_Places, _Places]:
    """From `numbered` columns: where each distinct row occurs, sorted by the columns in turn, and the number of each row."""
    code, size = np.zeros(1, np.intp), 1
    for values, place in columns:
        code, size = code * len(values) + place, size * len(values)
    found, places = numbered(code)
    where = np.empty(len(found), np.intp)
    where[places] = np.arange(len(code))
    return where, places


def numbered(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], _Places]:
    """The distinct values, sorted, and the number of each: `np.unique(values, return_inverse=True)`.

    Whole numbers that lie close together are looked up, not sorted.

    >>> [found.tolist() for found in numbered(np.array([7, 5, 7]))]
    [[5, 7], [1, 0, 1]]
    """
    low, high = values.min(), values.max()
    if low == high:
        return values[:1], np.zeros(len(values), np.intp)
    if not high - low < _MOST_SPREAD * len(values):
        return _sorted(values)
    above = (values - low).astype(np.intp)
    if values.dtype.kind == "f" and not np.array_equal(above + low, values):
        return _sorted(values)
    occurs = np.zeros(int(high - low) + 1, np.bool_)
    occurs[above] = True
    found = np.flatnonzero(occurs)
    number = np.empty(len(occurs), np.intp)
    number[found] = np.arange(len(found))
    return (found + low).astype(values.dtype), number.take(above)


def _sorted(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], _Places]:
    found, places = np.unique(values, return_inverse=True)
    return found, places.ravel()
