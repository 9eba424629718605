"""Inter-token latency (ITL) from a run's steps: the times between successive output tokens of each request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS

Ints = npt.NDArray[np.int64]
Members = tuple[npt.NDArray[np.int32], Ints, Ints]

_CHUNK_STEPS: Final = 1 << 15  # memory stays flat, however many steps there are


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
    gaps = np.empty(pc.sum(pc.list_value_length(run.steps["request"])).as_py() or 0, np.float32)
    size = 0
    for members in _members(run.steps):
        found = _gaps(members, furthest, last_ns)
        gaps[size : size + found.size] = found
        size += found.size
    return gaps[:size]


def _members(steps: pa.Table) -> Iterator[Members]:
    """(request, tokens known after the step, end of the step) of every member of every batch, in chunks of steps."""
    for chunk in steps.select(["request", "cache_len", "input_len", "end_ns"]).to_batches(_CHUNK_STEPS):
        sizes = pc.list_value_length(chunk["request"]).to_numpy()
        request, known, added = (chunk[name].flatten().to_numpy() for name in ("request", "cache_len", "input_len"))
        yield request, known.astype(np.int64) + added, np.repeat(chunk["end_ns"].to_numpy(), sizes)


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
