"""The list columns of a `steps` table as flat arrays, a part of a long log at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray = npt.NDArray[np.int64]

_CHUNK_MEMBERS = 2_000_000  # batch members in memory at once: some 16 MB per array


def chunks(steps: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Consecutive slices of a `steps` table with a bounded number of batch members, and the row each begins at."""
    if not steps.num_rows:
        return
    ends = np.cumsum(pc.list_value_length(steps.column("request")).to_numpy())
    first = 0
    while first < steps.num_rows:
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _CHUNK_MEMBERS, side="right")))
        yield first, steps.slice(first, last - first)
        first = last


def flat(column: pa.ChunkedArray) -> tuple[IntArray, IntArray]:
    """All entries of a list column laid end to end, and how many each row has (0 for null)."""
    lists = column.combine_chunks()
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists.flatten().to_numpy().astype(np.int64), counts
