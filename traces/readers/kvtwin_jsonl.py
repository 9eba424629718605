"""kvtwin's own request format: one JSON object per line, sorted by arrival; `.gz` is unpacked.

    {"request_id": "r0", "arrival_s": 0.5, "input_length": 204, "output_length": 24}

| field | meaning |
| --- | --- |
| `request_id` | unique string |
| `arrival_s` or `arrival_ns` | seconds (rounded to nanoseconds) or integer nanoseconds; `arrival_ns` wins |
| `input_length`, `output_length` | tokens, at least 1 |
| `hash_ids` | optional: one integer per block of prompt tokens, the last may be partial; equal ids, equal content |
| `prompt_token_ids` | optional, instead of `hash_ids` |
| `priority` | optional integer, smaller runs first |

It is also the `trace.jsonl` of our recordings and of the oracle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtwin.traces.readers.text import MAX_HASH, MAX_TIME_NS, MAX_TOKENS, Row, provenance, read_jsonl
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import from_seconds
from kvtwin.traces.workload import intern_token_blocks

_DEFAULT_ID_TOKENS = 512
_DEFAULT_TOKEN_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the file, checked."""

    row: Row
    request_id: str
    arrival_ns: int
    input_tokens: int
    output_tokens: int
    priority: int | None
    hash_ids: list[int] | None
    token_ids: list[int] | None


def read(path: Path, hash_block_tokens: int | None = None) -> Run:
    """Read a workload; `hash_block_tokens` is the number of tokens that one entry of `block_hashes` stands for.

    Without it, that is 512 for `hash_ids` (as in Mooncake's traces) and 16 for prompts given as token ids.

    Raises:
        InputError: with file, row and column; also where arrivals are not sorted or an id occurs twice.
    """
    id_tokens = hash_block_tokens or _DEFAULT_ID_TOKENS
    requests = parse(path, id_tokens)
    refuse_unsorted(requests, "arrival_s")
    hashes, block_tokens = block_hashes(requests, id_tokens, hash_block_tokens or _DEFAULT_TOKEN_BLOCK)
    columns = {
        "request_id": [request.request_id for request in requests],
        "arrival_ns": [request.arrival_ns for request in requests],
        "input_tokens": [request.input_tokens for request in requests],
        "output_tokens": [request.output_tokens for request in requests],
        "priority": [request.priority for request in requests],
        "block_hashes": hashes,
    }
    info = RunInfo("workload", hash_block_tokens=block_tokens, source=provenance(path, "kvtwin_jsonl", [path]))
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))


def parse(path: Path, hash_block_tokens: int) -> list[Request]:
    """Read and check every line, in the file's order.

    Raises:
        InputError: with file, row and column.
    """
    seen: set[str] = set()
    requests = []
    for row in read_jsonl(path):
        request = _parse_row(row, hash_block_tokens)
        if request.request_id in seen:
            row.fail("request_id", f"{request.request_id!r} occurs twice: ids must be unique")
        seen.add(request.request_id)
        requests.append(request)
    return requests


def _parse_row(row: Row, hash_block_tokens: int) -> Request:
    input_tokens = row.tokens("input_length")
    return Request(
        row=row,
        request_id=row.text("request_id"),
        arrival_ns=_arrival_ns(row),
        input_tokens=input_tokens,
        output_tokens=row.tokens("output_length"),
        priority=row.integer("priority", -(1 << 63), (1 << 63) - 1) if row.has("priority") else None,
        hash_ids=_hash_ids(row, input_tokens, hash_block_tokens) if row.has("hash_ids") else None,
        token_ids=_token_ids(row, input_tokens) if row.has("prompt_token_ids") else None,
    )


def _arrival_ns(row: Row) -> int:
    if row.has("arrival_ns"):
        return row.nanoseconds("arrival_ns")
    return min(from_seconds(row.seconds("arrival_s")), MAX_TIME_NS)


def _hash_ids(row: Row, input_tokens: int, hash_block_tokens: int) -> list[int]:
    ids = row.integers("hash_ids", MAX_HASH)
    expected = -(-input_tokens // hash_block_tokens)
    if len(ids) != expected:
        row.fail("hash_ids", f"{len(ids)} ids for {input_tokens} tokens: {expected} expected")
    return ids


def _token_ids(row: Row, input_tokens: int) -> list[int]:
    ids = row.integers("prompt_token_ids", MAX_TOKENS)
    if len(ids) != input_tokens:
        row.fail("prompt_token_ids", f"{len(ids)} ids, but input_length is {input_tokens}")
    return ids


def refuse_unsorted(requests: Iterable[Request], column: str) -> None:
    """Raise InputError for the first request that arrives before the one above it."""
    last = 0
    for request in requests:
        if request.arrival_ns < last:
            problem = f"{request.arrival_ns} ns is before the row above ({last} ns): sort the file by arrival"
            request.row.fail("arrival_ns" if request.row.has("arrival_ns") else column, problem)
        last = request.arrival_ns


def block_hashes(
    requests: list[Request], hash_block_tokens: int, token_block: int
) -> tuple[list[list[int] | npt.NDArray[np.uint64] | None] | None, int | None]:
    """The `block_hashes` column of the requests and its block size; (None, None) where no prompt is known.

    Raises:
        InputError: a file that gives some prompts as hash ids and others as token ids, which cannot be compared.
    """
    by_tokens = [request for request in requests if request.token_ids is not None]
    by_hashes = [request for request in requests if request.hash_ids is not None]
    if by_tokens and by_hashes:
        both = max(by_tokens[0], by_hashes[0], key=lambda request: request.row.number)
        column = "prompt_token_ids" if both is by_tokens[0] else "hash_ids"
        both.row.fail(column, "this file has both hash_ids and prompt_token_ids: use one of them throughout")
    if by_tokens:
        return list(intern_token_blocks([request.token_ids for request in requests], token_block)), token_block
    if by_hashes:
        return [request.hash_ids for request in requests], hash_block_tokens
    return None, None
