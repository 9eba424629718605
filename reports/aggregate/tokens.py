"""Inter-token latency (ITL) from a run's steps: the times between successive output tokens of each request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS

Ints = npt.NDArray[np.int64]
Members = tuple[npt.NDArray[np.int32], Ints, Ints]

_CHUNK_MEMBERS: Final = 1 << 20  # memory stays flat, however many steps there are


def inter_token_ms(run: Run) -> npt.NDArray[np.float32]:
    """Every inter-token latency of the run, in ms, in no order; none without steps.

    A member of a batch puts out a token when the step brings its known tokens to the prompt's end or beyond, and
    further than ever before: what is computed again after a preemption puts out none. Steps that put out several
    tokens of a request (speculative decoding) count as one.
    """
    if not run.has("steps"):
        return np.empty(0, np.float32)
    prompt = run.requests["input_tokens"].to_numpy()
    furthest = prompt - 1  # tokens known after the last output, per request
    last_ns = np.full(prompt.size, -1, np.int64)
    return np.concatenate([np.empty(0, np.float32), *(_gaps(part, furthest, last_ns) for part in _members(run.steps))])


def _members(steps: pa.Table) -> Iterator[Members]:
    """(request, tokens known after the step, end of the step) of every member of every batch, in chunks of steps."""
    request, cache, new = (steps[name].combine_chunks() for name in ("request", "cache_len", "input_len"))
    offsets = (column.offsets.to_numpy() for column in (request, cache, new))
    values = (column.values.to_numpy() for column in (request, cache, new))
    at, (of, known, added), ends = list(offsets), values, steps["end_ns"].to_numpy()
    begin = 0
    while begin < steps.num_rows:
        stop = int(np.searchsorted(at[0], at[0][begin] + _CHUNK_MEMBERS, side="right")) - 1
        stop = min(max(stop, begin + 1), steps.num_rows)
        parts = [slice(int(offset[begin]), int(offset[stop])) for offset in at]
        sizes = np.diff(at[0][begin : stop + 1])
        total = known[parts[1]].astype(np.int64) + added[parts[2]]
        yield of[parts[0]], total, np.repeat(ends[begin:stop], sizes)
        begin = stop


def _gaps(members: Members, furthest: Ints, last_ns: Ints) -> npt.NDArray[np.float32]:
    """Latencies that end in this chunk; brings `furthest` and `last_ns` up to date."""
    late = members[1] > furthest[members[0]]
    order = np.argsort(members[0][late], kind="stable")
    request, total, end = (column[late][order].astype(np.int64) for column in members)
    if not request.size:
        return np.empty(0, np.float32)
    # Within each request, further than ever before: a running maximum that starts anew where the request changes.
    reach = request * (int(total.max()) + 1) + total
    new = reach > np.concatenate([[-1], np.maximum.accumulate(reach)[:-1]])
    request, total, end = request[new], total[new], end[new]
    first = np.concatenate([[True], request[1:] != request[:-1]])
    before = np.where(first, last_ns[request], np.concatenate([[-1], end[:-1]]))
    last = np.append(np.flatnonzero(first)[1:] - 1, request.size - 1)
    furthest[request[last]], last_ns[request[last]] = total[last], end[last]
    known = before >= 0
    return ((end[known] - before[known]) / NS_PER_MS).astype(np.float32)
