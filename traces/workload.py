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
    depth = _places(counts)
    is_used = depth < np.repeat(used, counts)
    values, depth = values[is_used], depth[is_used]
    node = _number_nodes(values, depth)
    num_nodes_at = np.zeros(int(used.max(initial=0)), dtype=np.int64)
    np.maximum.at(num_nodes_at, depth, node + 1)
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


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], IntArray]:
    """All entries of a list column laid end to end, and how many each row has (0 for null)."""
    lists = column.combine_chunks()
    counts: IntArray = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists.flatten().to_numpy(), counts


def _places(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each count, laid end to end.

    >>> _places(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    places: IntArray = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return places


def _number_nodes(values: npt.NDArray[np.uint64], depth: IntArray) -> IntArray:
    """Number the nodes of each depth 0, 1, 2, ... in order of first appearance. Two entries are the same node exactly
    where they and all entries before them in their rows are equal.

    Args:
        values: entries of all rows, laid end to end.
        depth: place of each entry in its row.
    """
    if not len(values):
        return _NO_BLOCKS
    _, seen, name = np.unique(values, return_index=True, return_inverse=True)
    parent = np.where(depth > 0, np.concatenate(([-1], name[:-1])), -1)
    if not np.array_equal(parent[seen][name], parent):
        return _number_reused(values.tolist(), depth.tolist())
    # Each entry always follows the same one, as hashes of whole prefixes do: equal entries mean equal chains.
    order = np.lexsort((seen, depth[seen]))
    number = np.empty(len(seen), dtype=np.int64)
    number[order] = _places(np.bincount(depth[seen]))
    return number[name]


def _number_reused(values: list[int], depth: list[int]) -> IntArray:
    """`_number_nodes` where an entry may follow different ones, as ids of single blocks do."""
    nodes: list[dict[tuple[int, int], int]] = [{} for _ in range(max(depth) + 1)]
    numbers, parent = [], 0
    for value, place in zip(values, depth, strict=True):
        known = nodes[place]
        parent = known.setdefault((parent if place else 0, value), len(known))
        numbers.append(parent)
    return np.array(numbers, dtype=np.int64)
