"""What a prompt looks like to a prefix cache: equal ids where token prefixes are equal.

A Run's `block_hashes` column names the content of a prompt block by block: two prompts share their first k + 1
blocks exactly where their entries 0 to k are all equal. The ids may be a format's own (Mooncake's `hash_ids`) or
interned from token ids; an entry alone says nothing, the chain does. `prefix_blocks` turns the chains into ids of
engine blocks, of any size, that can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

IntArray = npt.NDArray[np.int64]

_NO_BLOCKS: IntArray = np.empty(0, dtype=np.int64)


def intern_token_blocks(
    prompts: Iterable[npt.ArrayLike | None], block_tokens: int
) -> list[npt.NDArray[np.uint64] | None]:
    """Name each full block of each prompt: equal names where the prompts' tokens up to the block's end are equal.

    Args:
        prompts: token ids of each prompt; None where unknown (its entry stays None).
        block_tokens: tokens per block, at least 1.

    Returns:
        One array per prompt with `len(prompt) // block_tokens` ids: 0, 1, 2, ... in order of first appearance.

    >>> [ids.tolist() for ids in intern_token_blocks([[7, 8, 9, 9, 5], [7, 8, 1, 1], [9, 9]], 2)]
    [[0, 1], [0, 2], [3]]
    """
    names: dict[tuple[int, bytes], int] = {}
    result: list[npt.NDArray[np.uint64] | None] = []
    for prompt in prompts:
        if prompt is None:
            result.append(None)
            continue
        content = np.ascontiguousarray(prompt, dtype=np.int64)
        num_full = len(content) // block_tokens
        chain = np.empty(num_full, dtype=np.uint64)
        parent = -1
        for block in range(num_full):
            key = (parent, content[block * block_tokens : (block + 1) * block_tokens].tobytes())
            parent = chain[block] = names.setdefault(key, len(names))
        result.append(chain)
    return result


def prefix_blocks(requests: pa.Table, hash_block_tokens: int | None, block_size: int) -> list[IntArray]:
    """Ids of each request's full engine blocks, comparable one by one.

    Entry i of two requests is equal exactly where the first (i + 1) * block_size tokens of their prompts are, as far
    as `block_hashes` can tell: prompts count as different from the start of the hash block in which they differ
    (exact for hash_ids of the oracle's kind, where every token follows from its id). The ids are non-negative and
    compact. Where the hashes end before the prompt's last full engine block, so does the array: the rest is shared
    with nobody. A request without hashes gets an empty array.

    Args:
        requests: table of schema REQUESTS.
        hash_block_tokens: tokens per entry of block_hashes (`RunInfo.hash_block_tokens`); None where there are none.
        block_size: tokens per engine block, at least 1.
    """
    if hash_block_tokens is None:
        return [_NO_BLOCKS] * requests.num_rows
    values, counts = _flat(requests.column("block_hashes"))
    # Entries behind the prompt's last full engine block are no part of any.
    num_full = requests.column("input_tokens").to_numpy() // block_size
    used = np.minimum(counts, -(-num_full * block_size // hash_block_tokens))
    depth = places(counts)
    is_used = depth < np.repeat(used, counts)
    values, depth = values[is_used], depth[is_used]
    node, num_nodes_at = _number_by_depth(_name_nodes(values, depth), depth)
    # Engine block i ends in the hash block of depth d where first[d] <= i < first[d + 1]; a chain node of depth d
    # owns that many consecutive ids, so a chain expands with one repeat and one addition.
    first = np.arange(len(num_nodes_at) + 1, dtype=np.int64) * hash_block_tokens // block_size
    width = np.diff(first)
    base = np.concatenate(([0], np.cumsum(num_nodes_at * width)))[:-1]
    num_ids = np.minimum(width[depth], np.repeat(num_full, used) - first[depth])
    before = np.cumsum(num_ids) - num_ids
    ids = np.repeat(base[depth] + node * width[depth] - before, num_ids)
    ids += np.arange(len(ids))
    ends = np.cumsum(np.minimum(num_full, first[used])).tolist()
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def prefix_nodes(requests: pa.Table) -> list[list[int]]:
    """Names of each request's hash blocks, the last and shorter one included: equal where the prompts are, up to there.

    Blocks get numbers as they first appear, so that those which a prompt is the first to have are consecutive. A
    request without hashes gets an empty list.
    """
    return _nodes(requests.column("block_hashes"))


def sequence_nodes(requests: pa.Table, hash_block_tokens: int) -> list[list[int]]:
    """Like `prefix_nodes`, of prompts and what is known of their outputs (`output_block_hashes`)."""
    return _nodes(_with_outputs(requests, hash_block_tokens))


def _nodes(hashes: pa.ChunkedArray) -> list[list[int]]:
    values, counts = _flat(hashes)
    names = _name_nodes(values, places(counts)).tolist()
    ends = np.cumsum(counts).tolist()
    return [names[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _with_outputs(requests: pa.Table, hash_block_tokens: int) -> pa.ChunkedArray:
    """block_hashes, and where it is known, what the output adds to the prompt's whole blocks."""
    prompts, outputs = requests.column("block_hashes"), requests.column("output_block_hashes")
    if outputs.null_count == requests.num_rows:
        return prompts
    whole = (requests.column("input_tokens").to_numpy() // hash_block_tokens).tolist()
    chains = [
        prompt if output is None else [*(prompt or ())[:num_blocks], *output]
        for prompt, output, num_blocks in zip(prompts.to_pylist(), outputs.to_pylist(), whole, strict=True)
    ]
    return pa.chunked_array([pa.array(chains, prompts.type)])


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], IntArray]:
    """All entries of a list column laid end to end, and how many each row has (0 for null)."""
    lists = column.combine_chunks()
    counts: IntArray = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists.flatten().to_numpy(), counts


def places(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each count, laid end to end.

    >>> places(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    places: IntArray = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return places


def _name_nodes(values: npt.NDArray[np.uint64], depth: IntArray) -> IntArray:
    """Name entries 0, 1, 2, ... in order of first appearance: equal where they and all before them in their rows are.

    Args:
        values: entries of all rows, laid end to end.
        depth: place of each entry in its row.
    """
    if not len(values):
        return _NO_BLOCKS
    _, seen, name = np.unique(values, return_index=True, return_inverse=True)
    parent = np.where(depth > 0, np.concatenate(([-1], name[:-1])), -1)
    if np.array_equal(parent[seen][name], parent):
        # Each entry always follows the same one, as hashes of whole prefixes do: equal entries mean equal chains.
        rank = np.empty(len(seen), dtype=np.int64)
        rank[np.argsort(seen)] = np.arange(len(seen))
        return rank[name]
    names: dict[tuple[int, int], int] = {}
    chains, before = [], -1
    for value, place in zip(values.tolist(), depth.tolist(), strict=True):
        before = names.setdefault((before if place else -1, value), len(names))
        chains.append(before)
    return np.array(chains, dtype=np.int64)


def _number_by_depth(names: IntArray, depth: IntArray) -> tuple[IntArray, IntArray]:
    """Number the names of each depth 0, 1, 2, ...: the number of each entry, and how many each depth has."""
    if not len(names):
        return _NO_BLOCKS, _NO_BLOCKS
    _, first = np.unique(names, return_index=True)
    num_at = np.bincount(depth[first])
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(depth[first], kind="stable")] = places(num_at)
    return number[names], num_at


def with_prompts(run: Run, sent: Run | None) -> Run:
    """A recording with the prompt blocks of the workload that was sent, joined by request id.

    The output lengths stay the recorded ones: a workload's are most often limits, which an answer need not reach.

    Raises:
        InputError: a recorded request is not in the workload, or has a prompt of another length.
    """
    if sent is None:
        return run
    rows = {name: row for row, name in enumerate(sent.requests.column("request_id").to_pylist())}
    order = []
    for row, name in enumerate(run.requests.column("request_id").to_pylist()):
        if name not in rows:
            raise InputError(f"{name!r} is not in the workload", path=run.path, row=row, column="request_id")
        order.append(rows[name])
    prompts = sent.requests.take(order)
    lengths = [table.column("input_tokens").to_pylist() for table in (run.requests, prompts)]
    for row, (found, asked) in enumerate(zip(*lengths, strict=True)):
        if found != asked:
            raise InputError(f"{found}, but the workload has {asked}", path=run.path, row=row, column="input_tokens")
    index = run.requests.column_names.index("block_hashes")
    requests = run.requests.set_column(index, run.requests.schema.field(index), prompts.column("block_hashes"))
    info = run.info
    joined = type(info)(**{**vars(info), "hash_block_tokens": sent.info.hash_block_tokens})
    return Run(joined, {"requests": requests}, name=str(run.path))
