"""Attention of decodes alone: packed queries, split contexts and caches."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, Terms, attention_heads, ceil, context_of_each, waves_of, windowed

PIECE: Final = 128.0  # keys that a thread block takes at a time
_SMALL_PIECE: Final = 32.0  # where no context is split
_SHORT: Final = (64.0, 128.0, 256.0)  # tokens of context up to which kernels may run a simpler path
# Keys of one head that caches may hold: between calls, and between the query heads of a group.
CACHES: Final = tuple(2.0**power * part for power in range(14, 21) for part in (1.0, 1.5))


def decode_attention(columns: Columns, tile: float, slots: float) -> Terms:
    """A context is cut into pieces where blocks would leave slots idle; a second kernel adds their results up."""
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], windowed(context_of_each(columns), columns, 0.0)
    blocks = seqs * kv_heads * ceil(heads / kv_heads, tile)
    pieces = np.maximum(ceil(context, PIECE), 1.0)
    splits = np.clip(np.floor((slots or 1.0) / blocks), 1.0, pieces)
    split = (splits > 1).astype(np.float64)
    # A block computes whole pieces, but loads only the keys that are there, and where contexts are split it waits for those.
    longest = np.maximum(context, PIECE) / splits
    waves = waves_of(blocks * splits, slots)
    whole_waves, whole = waves_of(blocks, slots), ceil(context, _SMALL_PIECE) * _SMALL_PIECE
    read = seqs * kv_heads * context
    packed = ((kv_heads > 1) & (heads > kv_heads)).astype(np.float64)
    terms = {
        "call": np.ones(len(seqs)),
        "waves": waves,
        "wave keys": waves * longest,
        "longest": longest,
        "unsplit waves": whole_waves,
        "unsplit wave keys": whole_waves * whole,
        "split": split,
        "splits": split * splits,
        "partial queries": split * splits * seqs * heads,  # what the pieces write and a second kernel adds up
        "keys": read,
        "query keys": seqs * heads * context,
        "queries": seqs * heads,
        "several": (seqs > 1).astype(np.float64),
        # With several key-value heads, FlashAttention-2 first copies the queries that it packs (`seqlenq_ngroups_swapped`).
        "packed": packed,
        "packed queries": packed * seqs * heads,
    }
    for limit in _SHORT:  # kernels for short contexts: one piece and no second kernel
        beyond = (context > limit).astype(np.float64)
        terms |= {f"beyond {int(limit)}": beyond, f"queries beyond {int(limit)}": beyond * seqs * heads}
    return terms | spills(read) | uncached(read)


def uncached(read: FloatArray) -> Terms:
    """All keys, once they exceed what a cache of each size holds.

    A benchmark reads the same keys call after call: a cache that is large enough holds all of them, a smaller one none,
    since what is read next was evicted last.
    """
    return {f"uncached beyond {int(size)}": np.where(read >= size, read, 0.0) for size in CACHES}


def spills(read: FloatArray) -> Terms:
    """Keys beyond what a cache of each size holds: their price is that of memory, not of the cache."""
    return {f"keys over {int(size)}": np.maximum(read - size, 0.0) for size in (65536.0, 262144.0, 1048576.0)}
