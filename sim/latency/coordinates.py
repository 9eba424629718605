"""Physical coordinates of a batch: products of its columns, in which a kernel's behaviour is alike across shapes.

A kernel at 64 requests of 1,000 tokens is seen where 16 requests of 4,000 tokens were measured; a matrix product of
1,024 x 4,096 fills as many tiles as one of 4,096 x 1,024. Surfaces (`surface.py`) and forests (`forest.py`) on a trend
are functions of these. Only +, -, *, / and comparisons and ceil, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, attention_heads, context_of_each, prefills

_USUAL_SLOTS: Final = 132.0  # tiles at once, where the trend saw no waves
_TILES: Final = ((64.0, 64.0), (64.0, 128.0), (128.0, 128.0), (128.0, 256.0), (256.0, 128.0))  # rows, columns
_ALIGNMENTS: Final = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def _decode(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], context_of_each(columns)
    blocks = seqs * kv_heads
    return {
        "blocks": blocks, "context": context, "keys": blocks * context, "queries": seqs * heads,
        "num_decode": seqs, "kv_heads": kv_heads,
    }  # fmt: skip


def _prefill(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    heads, kv_heads = attention_heads(columns)
    seqs, chunk, prefix = prefills(columns)
    return {
        "blocks": seqs * heads, "chunk": chunk, "queries": seqs * heads * chunk, "num_seqs": seqs,
        "kv_heads": kv_heads, "prefix": prefix, "pairs": seqs * heads * chunk * (prefix + chunk / 2),
        "rows": 2.0 * seqs * (chunk * heads + (prefix + chunk) * kv_heads),
    }  # fmt: skip


def _mixed(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    seqs, context = columns["num_decode"], columns["context"]
    num_prefills, chunk, prefix = prefills(columns)
    key = prefix + chunk / 2
    return {
        "num_decode": seqs, "context": context, "keys": seqs * context, "chunk": num_prefills * chunk, "prefix": prefix,
        "pairs": num_prefills * chunk * key, "keys of blocks": num_prefills * np.ceil(chunk / 64) * key + seqs * context,
    }  # fmt: skip


def _gemm(columns: Columns, slots: float) -> dict[str, FloatArray]:
    """The sizes, their products and m's alignment; and for each tiling that libraries choose among, how much of the last
    wave is idle and how much of the tiles' area is padding."""
    m, n, k = columns["m"], columns["n"], columns["k"]
    slots = slots or _USUAL_SLOTS
    found = {
        "m": m, "n": n, "k": k, "products": m * n * k, "inputs": m * k, "outputs": m * n, "weights": n * k,
        "alignment": _alignment(m),
    }  # fmt: skip
    for rows, width in _TILES:
        tiles, name = np.ceil(m / rows) * np.ceil(n / width), f"{rows:.0f} x {width:.0f}"
        found[f"idle {name}"] = np.ceil(tiles / slots) * slots / tiles
        found[f"padding {name}"] = tiles * (rows * width) / (m * n)
    return found


def _alignment(m: FloatArray) -> FloatArray:
    """The largest of 1, 2, 4 ... 64 that divides m: rows (or their scales) that are not aligned are copied first."""
    found = np.ones(len(m))
    for size in _ALIGNMENTS:
        found = np.where(m % size == 0, size, found)
    return found


# By `OpSamples.work`.
COORDINATES: Final[Mapping[str, Callable[[Columns, float], dict[str, FloatArray]]]] = {
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "mixed_attention": _mixed,
    "gemm": _gemm,
}
