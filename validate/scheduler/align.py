"""Which step of one run is which of the other: a diff of two step sequences.

Steps pair by what they computed, wherever they stand, so that one step too many shifts the rest and does not spoil it.
As a rule a batch occurs once in a run; the n-th occurrence of one pairs with the n-th of the other. The longest sequence
of pairs that runs forward in both (Hunt & Szymanski 1977; for sequences without repeats it is the exact diff) is found
in O(n log n).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.generic]

NO_STEP = -1


@dataclass(frozen=True)
class Alignment:
    """Two step sequences side by side.

    Attributes:
        measured, simulated: by row of the alignment, the step of each; -1 where that run has none. Each run's steps
            stand in their order.
        is_pair: whether both computed the same batch; between two such rows, steps stand beside one another as they
            come.
    """

    measured: IntArray
    simulated: IntArray
    is_pair: BoolArray

    def __len__(self) -> int:
        return len(self.is_pair)


def align(measured: Keys, simulated: Keys) -> Alignment:
    """Align two sequences of step keys; never fewer pairs than by position, and as many the other way round.

    >>> rows = align(np.array([7, 8, 9, 5]), np.array([7, 9, 5, 6]))
    >>> rows.measured.tolist(), rows.simulated.tolist()
    ([0, 1, 2, 3, -1], [0, -1, 1, 2, 3])
    """
    ours, theirs = _pairs(measured, simulated)
    return _side_by_side(ours, theirs, len(measured), len(simulated))


def _pairs(one: Keys, other: Keys) -> tuple[IntArray, IntArray]:
    """Places of the paired steps in each, both rising."""
    head = _agreeing(one, other)
    tail = _agreeing(one[head:][::-1], other[head:][::-1])
    middle = _longest_forward(one[head : len(one) - tail], other[head : len(other) - tail])
    return tuple(  # type: ignore[return-value]
        np.concatenate((np.arange(head), head + places, np.arange(len(keys) - tail, len(keys))))
        for keys, places in zip((one, other), middle, strict=True)
    )


def _agreeing(one: Keys, other: Keys) -> int:
    """How many entries agree from the start."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _longest_forward(one: Keys, other: Keys) -> tuple[IntArray, IntArray]:
    if not len(one) or not len(other):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, key = np.unique(np.concatenate((one, other)), return_inverse=True)
    ours, theirs = (_by_occurrence(part) for part in np.split(key, [len(one)]))
    _, place, place_other = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    order = np.argsort(place)
    place, place_other = place[order], place_other[order]
    kept = _rising(place_other)
    by_position = np.flatnonzero(one[: len(other)] == other[: len(one)])
    # Keys that occur often can be numbered so that fewer pairs run forward than stand at the same place.
    return (by_position, by_position) if len(by_position) > len(kept) else (place[kept], place_other[kept])


def _by_occurrence(key: IntArray) -> IntArray:
    """A number per entry that tells the occurrences of a key apart: the first, the second, ..."""
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    first = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    occurrence = np.empty(len(key), np.int64)
    occurrence[order] = np.arange(len(key)) - np.repeat(first, np.diff(np.append(first, len(key))))
    return (key.astype(np.int64) << 32) | occurrence


def _rising(values: IntArray) -> IntArray:
    """Places of a longest rising subsequence of distinct values (patience sorting)."""
    if (np.diff(values) > 0).all():
        return np.arange(len(values))
    ends: list[int] = []  # smallest last value of a rising subsequence, by length
    end_at: list[int] = []
    before = np.full(len(values), NO_STEP, np.int64)
    for place, value in enumerate(values.tolist()):
        length = bisect_left(ends, value)
        if length == len(ends):
            ends.append(value)
            end_at.append(place)
        else:
            ends[length], end_at[length] = value, place
        if length:
            before[place] = end_at[length - 1]
    path = []
    place = end_at[-1]
    while place != NO_STEP:
        path.append(place)
        place = int(before[place])
    return np.array(path[::-1])


def _side_by_side(ours: IntArray, theirs: IntArray, num_ours: int, num_theirs: int) -> Alignment:
    """Lay both sequences out so that paired steps share a row; the gaps between pairs are as long as their longer side."""
    firsts = [np.concatenate(([0], places + 1)) for places in (ours, theirs)]  # where each gap begins
    lengths = [
        np.append(places, num) - first
        for places, num, first in zip((ours, theirs), (num_ours, num_theirs), firsts, strict=True)
    ]
    longer = np.maximum(*lengths)
    starts = np.cumsum(np.concatenate(([0], longer[:-1] + 1)))
    num_rows = int(starts[-1] + longer[-1])
    columns = []
    for first, length in zip(firsts, lengths, strict=True):
        column = np.full(num_rows, NO_STEP, np.int64)
        offset = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        column[np.repeat(starts, length) + offset] = np.repeat(first, length) + offset
        columns.append(column)
    paired = starts[1:] - 1
    for column, places in zip(columns, (ours, theirs), strict=True):
        column[paired] = places
    is_pair = np.zeros(num_rows, np.bool_)
    is_pair[paired] = True
    return Alignment(columns[0], columns[1], is_pair)
