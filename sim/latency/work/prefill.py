"""Attention of prefills alone: thread blocks of the kernels that engines run, and what leaves a cache."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, Terms, attention_heads, ceil, column, prefills, waves_of, windowed
from kvtwin.sim.latency.work.decode import CACHES

_ONE_PACKED: Final = ", single queries packed"
_ALL_PACKED: Final = ", all queries packed"
_UNCACHED_ROWS: Final = ("rows of ", "uncached queries ", "uncached keys ")


def prefill_attention(columns: Columns, tile: float, slots: float) -> Terms:
    """Terms of each kernel that may run, by its ending (`alternatives`), and of rows that leave a cache."""
    heads, kv_heads = attention_heads(columns)
    seqs, chunk, prefix = prefills(columns)
    longest = windowed(prefix + chunk, columns, tile)
    kernels: Terms = {}
    for kernel, (blocks, rows) in _kernels(chunk, heads, kv_heads, tile).items():
        span = windowed(prefix + (np.minimum(chunk, rows) + chunk) / 2, columns, tile)
        found = _prefill_blocks(seqs * blocks, span, longest, slots)
        kernels |= {f"{name}{kernel}": term for name, term in found.items()}
    return {
        "call": np.ones(len(chunk)),
        **kernels,
        "longest": longest,
        "queries": seqs * chunk * (heads + kv_heads),
        "prefix": seqs * prefix * kv_heads,
        **_uncached_rows(2.0 * seqs * chunk * heads, 2.0 * seqs * (prefix + chunk) * kv_heads),
    }


def _kernels(
    chunk: FloatArray, heads: FloatArray, kv_heads: FloatArray, tile: float
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Thread blocks of a prompt, and tokens of each: one head's queries, or those of all heads that share keys.

    FlashAttention-2 packs heads for prompts of one token, which run as decodes do (`seqlenq_ngroups_swapped`),
    FlashAttention-3 (`PackGQA`) and FlashInfer for longer ones too.
    """
    group, every = heads / kv_heads, np.full(len(chunk), tile)
    plain, packed = heads * ceil(chunk, tile), kv_heads * ceil(chunk * group, tile)
    return {
        "": (plain, every),
        _ONE_PACKED: (np.where(chunk == 1, packed, plain), every),
        _ALL_PACKED: (packed, every / group),
    }


def _prefill_blocks(blocks: FloatArray, span: FloatArray, longest: FloatArray, slots: float) -> Terms:
    waves, share = waves_of(blocks, slots), blocks * span / (slots or 1.0)
    return {
        "waves": waves,
        "wave keys": waves * span,
        "keys": share,
        "busy or longest": np.maximum(share, longest),
        "blocks": blocks,
    }


def _uncached_rows(queries: FloatArray, keys: FloatArray) -> Terms:
    """Rows of queries and outputs, and of keys and values (one head and token each), once both exceed a cache together.

    The same all-or-nothing as for decodes (`uncached`): on the RTX PRO 6000 a call with 64 MB of rows takes 30 us, one
    with 128 MB 140 us.
    """
    terms = {"rows of queries": queries, "rows of keys": keys}
    for size in CACHES:
        beyond = queries + keys >= size
        terms[f"uncached queries beyond {int(size)}"] = np.where(beyond, queries, 0.0)
        terms[f"uncached keys beyond {int(size)}"] = np.where(beyond, keys, 0.0)
    return terms


def alternatives(found: Terms, columns: Columns) -> dict[str, Terms]:
    """What each of several kernels would do, where it differs from the plain one on these batches: that one first.

    Whether rows leave a cache shows where batches of several sizes have as many; with one prompt at a time it is a step on
    the axes of the table itself, which is interpolated better without.
    """
    if len(np.unique(column(columns, "num_seqs", 1.0))) == 1:
        found = {name: term for name, term in found.items() if not name.startswith(_UNCACHED_ROWS)}
    plain = {name: term for name, term in found.items() if not name.endswith((_ONE_PACKED, _ALL_PACKED))}
    kernels = {"": plain}
    for kernel in (_ONE_PACKED, _ALL_PACKED):
        own = {name: term for name, term in found.items() if name.endswith(kernel)}
        if any(not np.array_equal(term, plain[name.removesuffix(kernel)]) for name, term in own.items()):
            kernels[kernel] = own | {name: term for name, term in plain.items() if f"{name}{kernel}" not in own}
    return kernels
