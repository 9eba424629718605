"""A workload as a Mooncake trace: lengths, milliseconds and `hash_ids`, see `readers/mooncake.py`.

The format has neither names nor sessions, and its clock counts whole milliseconds: arrivals are rounded down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import replacing_text
from kvtwin.traces.readers.mooncake import HASH_BLOCK_TOKENS
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.traces.workload import prefix_nodes


def write_mooncake(run: Run, path: str | os.PathLike[str]) -> int:
    """Write the run's requests, replacing an older file: all of it or nothing.

    A run whose block hashes stand for fewer tokens keeps the sharing of whole blocks of 512. Where it does not know a
    prompt, its blocks get ids that no other prompt has.

    Args:
        run: any run whose hash_block_tokens is unknown or divides 512.
        path: a name that ends in .gz is compressed.

    Returns:
        How many lines were written.

    Raises:
        InputError: other block hashes, or the place cannot be written to.
    """
    columns = [run.requests.column(name).to_numpy() for name in ("arrival_ns", "input_tokens", "output_tokens")]
    arrival_ns, inputs, outputs = columns
    timestamps = arrival_ns // NS_PER_MS
    rows = zip(timestamps.tolist(), inputs.tolist(), outputs.tolist(), _hash_ids(run), strict=True)
    with replacing_text(path) as text:
        for timestamp, input_length, output_length, hash_ids in rows:
            line = {
                "timestamp": timestamp,
                "input_length": input_length,
                "output_length": output_length,
                "hash_ids": hash_ids,
            }
            text.write(json.dumps(line) + "\n")
    return len(timestamps)


def _hash_ids(run: Run) -> Iterator[list[int]]:
    """Ids of each prompt's blocks of 512 tokens, the last and shorter one included.

    A block is named by the run's own block in which it ends, which stands for all of the prompt up to there.
    """
    size = run.info.hash_block_tokens or HASH_BLOCK_TOKENS
    if HASH_BLOCK_TOKENS % size:
        raise InputError(
            f"hash_block_tokens is {size}: a Mooncake trace needs a divisor of {HASH_BLOCK_TOKENS}", path=run.path
        )
    step = HASH_BLOCK_TOKENS // size
    chains = prefix_nodes(run.requests)
    unshared = count(1 + max((max(chain) for chain in chains if chain), default=-1))
    blocks = -(-run.requests.column("input_tokens").to_numpy() // HASH_BLOCK_TOKENS)
    for chain, num_blocks in zip(chains, np.asarray(blocks).tolist(), strict=True):
        ids = chain[step - 1 : num_blocks * step : step]
        if len(ids) < num_blocks and len(chain) > len(ids) * step:
            ids.append(chain[-1])
        yield ids + [next(unshared) for _ in range(num_blocks - len(ids))]
