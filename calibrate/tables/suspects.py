"""Which rows of a table are doubted: they are named, and never fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.tables.dominance import num_below
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.traces.readers.optable import OpSamples

_FASTER_THAN_SMALLEST: Final = 0.75
_FEW: Final = 5
# The most that a row of the tables seen stands out of its line is 23 times (one mixture of experts on B200).
_STANDS_OUT: Final = 30.0
_STEEPEST: Final = 2  # time grows no faster than the square of a load


def with_suspects(sample: OpSamples) -> OpSamples:
    """The samples with doubtful rows marked, besides those that are marked already."""
    doubted = faster_than_smallest(sample) | faster_than_less(sample) | stands_out(sample)
    return replace(sample, suspect=sample.suspect | doubted)


def faster_than_smallest(sample: OpSamples) -> npt.NDArray[np.bool_]:
    """Attention rows that take less than 3/4 of the time of their shape's smallest load: no more work can be faster.

    (LLMServingSim v0 has 283 such decodes in each table: less than one token of context for each.)
    """
    found = np.zeros(len(sample), np.bool_)
    if sample.work not in ("prefill_attention", "decode_attention") or not len(sample):
        return found
    rank: FloatArray = sum(
        (np.log2(1.0 + np.asarray(values, np.float64)) for values in sample.load.values()), np.zeros(len(sample))
    )
    if sample.shape:
        _, group = np.unique(np.column_stack(list(sample.shape.values())), axis=0, return_inverse=True)
    else:
        group = np.zeros(len(sample), np.intp)
    for index in range(int(group.max()) + 1):
        here = np.flatnonzero(group.ravel() == index)
        first = here[np.argsort(rank[here], kind="stable")[:_FEW]]
        floor = min(float(sample.time_us[first[0]]), float(np.median(sample.time_us[first])))
        found[here] = sample.time_us[here] < _FASTER_THAN_SMALLEST * floor
    return found


def faster_than_less(sample: OpSamples) -> npt.NDArray[np.bool_]:
    """Rows of whole steps that take less than 3/4 of the time of a step with no more of any load.

    Medians of repeats are compared. The batch that contradicts most others is doubted, then of the rest the one that
    contradicts most others, and so on: one step that is too slow does not cast doubt on all larger ones. (Splitwise: 64
    prompts on two GPUs, 0.8 s, where 16 take 3.2 s and 32 take 6.6 s.)
    """
    if not sample.work.endswith("_step"):
        return np.zeros(len(sample), np.bool_)
    loads, index = np.unique(np.column_stack(list(sample.load.values())), axis=0, return_inverse=True)
    index = index.ravel()
    time_us = _median_of_each(sample.time_us, index)
    least_us = _FASTER_THAN_SMALLEST * time_us  # of any batch with no less of anything
    beyond = np.nextafter(time_us, np.inf)  # so that what is equal is not counted
    num_others = num_below(
        np.column_stack([loads, np.nextafter(-least_us, np.inf)]), np.column_stack([loads, -time_us])
    )
    num_others += num_below(np.column_stack([-loads, beyond]), np.column_stack([-loads, least_us]))
    doubted = np.zeros(len(loads), np.bool_)
    while num_others.any():
        worst = int(np.argmax(num_others))
        is_more, is_less = np.all(loads >= loads[worst], axis=1), np.all(loads <= loads[worst], axis=1)
        apart = (is_more & (time_us < least_us[worst])) | (is_less & (time_us[worst] < least_us))
        num_others[apart & ~doubted] -= 1
        num_others[worst] = 0
        doubted[worst] = True
    return doubted[index]


def _median_of_each(values: FloatArray, index: npt.NDArray[np.intp]) -> FloatArray:
    """Median of the values with each index, 0 to the largest."""
    ordered = values[np.lexsort((values, index))]
    end = np.cumsum(np.bincount(index))
    first = np.concatenate([[0], end[:-1]])
    middle: FloatArray = (ordered[(first + end - 1) // 2] + ordered[(first + end) // 2]) / 2
    return middle


def stands_out(sample: OpSamples) -> npt.NDArray[np.bool_]:
    """Rows that lie 30 times outside of what their two nearest neighbours allow, along every load that has them.

    Between two neighbours a time is no longer than the later one's, nor than the earlier one's grown with the square of
    the load, and no shorter than the earlier one's. What is 30 times beyond is a row in another unit, a stall of
    seconds, or a slip of the pen.
    """
    excess = np.full(len(sample), np.inf)
    columns = {name: np.asarray(values, np.float64) for name, values in sample.columns.items()}
    for axis in sample.load:
        others = [values for name, values in columns.items() if name != axis]
        beyond = _beyond_neighbours(np.log1p(columns[axis]), np.log(sample.time_us), others)
        excess = np.fmin(excess, beyond)
    return np.asarray(np.isfinite(excess) & (excess > np.log(_STANDS_OUT)), np.bool_)


def _beyond_neighbours(load: FloatArray, time: FloatArray, others: Sequence[FloatArray]) -> FloatArray:
    """How far each time lies outside of what its neighbours allow, both in logarithms; NaN with fewer than two.

    Args:
        load, time: logarithms, (n,).
        others: columns in which the rows of a line are equal.
    """
    order = np.lexsort((time, load, *others))
    load, time = load[order], time[order]
    line = np.zeros(len(load), np.int64)
    for values in others:
        line[1:] += values[order][1:] != values[order][:-1]
    line = np.cumsum(line)
    above, below = (np.full((4, len(load)), np.nan) for _ in range(2))
    for index, ahead in enumerate((1, -1, 2, -2)):
        at = np.arange(len(load)) + ahead
        known = (at >= 0) & (at < len(load))
        known[known] = line[known] == line[at[known]]
        growth = _STEEPEST * (load[known] - load[at[known]])
        above[index, known] = time[known] - time[at[known]] - np.maximum(growth, 0)
        below[index, known] = time[at[known]] - time[known] + np.minimum(growth, 0)
    found = np.full(len(load), np.nan)
    found[order] = np.maximum(_of_two(above), _of_two(below))
    return found


def _of_two(beyond: FloatArray) -> FloatArray:
    """The smaller excess over one neighbour on each side; where one side has none, over two on the other."""
    both = ~np.isnan(beyond[0]) & ~np.isnan(beyond[1])
    pairs = np.where(both, beyond[:2], np.where(np.isnan(beyond[1]), beyond[::2], beyond[1::2]))
    smaller: FloatArray = np.minimum(pairs[0], pairs[1])
    return smaller
