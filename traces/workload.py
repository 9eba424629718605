"""What a prompt looks like to a prefix cache: equal ids where token prefixes are equal.

A Run's `block_hashes` column names the content of a prompt block by block: two prompts share their first k + 1
blocks exactly where their entries 0 to k are all equal. The ids may be a format's own (Mooncake's `hash_ids`) or
interned from token ids; an entry alone says nothing, the chain does. `prefix_blocks` turns the chains into ids of
engine blocks, of any size, that can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    chains, num_nodes_at = _intern_chains(_lists(requests.column("block_hashes")))
    # Engine block i ends in the hash block of depth d where first[d] <= i < first[d + 1]; a chain node of depth d
    # owns that many consecutive ids, so a chain expands with one repeat and one addition.
    depths = np.arange(len(num_nodes_at) + 1, dtype=np.int64)
    first = depths * hash_block_tokens // block_size
    width = np.diff(first)
    base = np.concatenate(([0], np.cumsum(num_nodes_at * width)))[:-1] - first[:-1]
    num_full = requests.column("input_tokens").to_numpy() // block_size
    depth_of = -(-num_full * block_size // hash_block_tokens)  # hash blocks that the full engine blocks reach into
    result = []
    for chain, limit, depth in zip(chains, num_full.tolist(), depth_of.tolist(), strict=True):
        if chain is None:
            result.append(_NO_BLOCKS)
            continue
        chain = chain[:depth]
        starts = base[: len(chain)] + chain * width[: len(chain)]
        ids = np.repeat(starts, width[: len(chain)])[:limit]
        ids += np.arange(len(ids), dtype=np.int64)
        result.append(ids)
    return result


def prefix_nodes(requests: pa.Table) -> list[list[int]]:
    """Names of each request's hash blocks, the last and shorter one included: equal where the prompts are, up to there.

    Blocks get numbers as they first appear, so that those which a prompt is the first to have are consecutive. A
    request without hashes gets an empty list.
    """
    names: dict[tuple[int, int], int] = {}
    result = []
    for entries in _lists(requests.column("block_hashes")):
        chain, parent = [], -1
        for entry in entries or ():
            parent = names.setdefault((parent, entry), len(names))
            chain.append(parent)
        result.append(chain)
    return result


def _intern_chains(lists: Sequence[list[int] | None]) -> tuple[list[IntArray | None], IntArray]:
    """For each list, the number of its node among the nodes of the same depth, at every depth; and how many nodes
    each depth has. Two lists have the same node at depth d exactly where their entries 0 to d are equal.
    """
    nodes: list[dict[tuple[int, int], int]] = []
    chains: list[IntArray | None] = []
    for entries in lists:
        if entries is None:
            chains.append(None)
            continue
        nodes.extend({} for _ in range(len(entries) - len(nodes)))
        chain, parent = [], 0
        for known, entry in zip(nodes, entries, strict=False):
            parent = known.setdefault((parent, entry), len(known))
            chain.append(parent)
        chains.append(np.array(chain, dtype=np.int64))
    return chains, np.array([len(known) for known in nodes], dtype=np.int64)


def _lists(column: pa.ChunkedArray) -> list[list[int] | None]:
    """The column as Python lists, many times faster than `to_pylist`."""
    result: list[list[int] | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy()
        bounds = chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        result += [
            values[start:end].tolist() if ok else None
            for start, end, ok in zip(bounds[:-1], bounds[1:], valid, strict=True)
        ]
    return result


def with_prompts(run: Run, sent: Run | None) -> Run:
    """A recording with the prompt blocks of the workload that was sent, joined by request id.

    Raises:
        InputError: a recorded request is not in the workload, or differs in length.
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
    for column in ("input_tokens", "output_tokens"):
        recorded, planned = run.requests.column(column).to_pylist(), prompts.column(column).to_pylist()
        for row, (found, asked) in enumerate(zip(recorded, planned, strict=True)):
            if found != asked:
                raise InputError(f"{found}, but the workload has {asked}", path=run.path, row=row, column=column)
    index = run.requests.column_names.index("block_hashes")
    requests = run.requests.set_column(index, run.requests.schema.field(index), prompts.column("block_hashes"))
    info = run.info
    joined = type(info)(**{**vars(info), "hash_block_tokens": sent.info.hash_block_tokens})
    return Run(joined, {"requests": requests}, name=str(run.path))
