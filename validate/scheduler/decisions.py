"""What each step decided, as numbers that can be compared a million at a time.

A batch becomes a 64-bit hash of its members (request, cache_len, input_len): one that does not depend on their order,
to find the same step elsewhere, and one that does. Two different steps share a hash with a chance of 5e-20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.run import Run
from kvtwin.validate.scheduler.lists import chunks, flat

IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

# The parts of a decision beside the batch, and what their columns hold.
LISTS: Final = ("preempted", "finished")
NOT_THERE: Final = -1


@dataclass(frozen=True)
class Decisions:
    """The steps of one run; every array has one entry per step.

    Attributes:
        members: hash of the batch, whatever its order.
        batch: hash of the batch in the scheduler's order.
        lists: hash of each list of LISTS, in order.
        is_known: whether the run records that list there.
        num_free_blocks: -1 where it is not recorded.
        num_reqs, num_tokens: size of the batch; new tokens in it.
    """

    members: HashArray
    batch: HashArray
    lists: dict[str, HashArray]
    is_known: dict[str, BoolArray]
    num_free_blocks: IntArray
    num_reqs: IntArray
    num_tokens: IntArray

    def __len__(self) -> int:
        return len(self.members)


def read_decisions(run: Run, names: IntArray) -> Decisions:
    """The decisions of a run.

    Args:
        run: with at least one step.
        names: by row of its requests, a number that both runs give the same request.
    """
    steps = run.steps
    parts = [_part(table, names) for _, table in chunks(steps)]
    joined: list[Any] = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    free = steps.column("num_free_blocks")
    return Decisions(
        members=joined[0],
        batch=joined[1],
        lists=dict(zip(LISTS, joined[2:4], strict=True)),
        is_known={name: steps.column(name).is_valid().to_numpy() for name in LISTS},
        num_free_blocks=free.fill_null(NOT_THERE).to_numpy(),
        num_reqs=joined[4],
        num_tokens=joined[5],
    )


def common_names(measured: Run, simulated: Run) -> tuple[IntArray, IntArray]:
    """Numbers for the requests of both runs: equal where their ids are."""
    ours, theirs = (run.requests.column("request_id").combine_chunks() for run in (measured, simulated))
    place = pc.index_in(theirs, value_set=ours)
    rest = len(ours) + np.arange(len(theirs))
    return np.arange(len(ours)), np.where(place.is_valid(), place.fill_null(0), rest)


def _part(steps: pa.Table, names: IntArray) -> tuple[npt.NDArray[Any], ...]:
    rows, counts = flat(steps.column("request"))
    cache_len, input_len = (flat(steps.column(name))[0] for name in ("cache_len", "input_len"))
    member = _mixed(_mixed(names[rows]) ^ ((cache_len << 32) | input_len).view(np.uint64))
    lists = []
    for name in LISTS:
        entries, sizes = flat(steps.column(name))
        lists.append(_in_order(_mixed(names[entries]), sizes))
    return _sums(member, counts), _in_order(member, counts), *lists, counts, _sums(input_len, counts)


def _in_order(entries: HashArray, counts: IntArray) -> HashArray:
    """A hash per row of its entries and their order."""
    ends = np.cumsum(counts)
    place = np.arange(len(entries)) - np.repeat(ends - counts, counts)
    sums: HashArray = _sums(_mixed(entries ^ _mixed(place)), counts)
    return sums + counts.view(np.uint64)


def _sums(values: npt.NDArray[Any], counts: IntArray) -> npt.NDArray[Any]:
    """Sum of each row's entries; hashes wrap around."""
    totals = np.concatenate((np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)))
    ends = np.cumsum(counts)
    result: npt.NDArray[Any] = totals[ends] - totals[ends - counts]
    return result


def _mixed(values: npt.NDArray[Any]) -> HashArray:
    """Spread integers over 64 bits: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x: HashArray = values.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
