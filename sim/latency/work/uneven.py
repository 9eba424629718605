"""Attention of batches whose lengths differ."""

from __future__ import annotations

import numpy as np

from kvtwin.sim.latency.work.columns import Columns, Terms, attention_heads, ceil
from kvtwin.sim.latency.work.decode import PIECE, spills
from kvtwin.sim.latency.work.lists import two_kinds
from kvtwin.sim.latency.work.mixed import misses


def uneven_decode(columns: Columns, tile: float, slots: float) -> Terms:
    """Decodes of two lengths; all are cut into pieces of the length that suits the longest."""
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], columns["context"]
    long_seqs = np.rint(seqs * columns["long_share"])
    longest = context * columns["skew"]
    blocks = seqs * kv_heads * ceil(heads / kv_heads, tile)
    pieces = np.maximum(ceil(longest, PIECE), 1.0)
    piece = ceil(pieces, np.clip(np.floor((slots or 1.0) / blocks), 1.0, pieces)) * PIECE
    many = long_seqs * kv_heads * ceil(longest, piece), np.minimum(piece, longest)
    few = (seqs - long_seqs) * kv_heads * ceil(context, piece), np.minimum(piece, context)
    read = kv_heads * (long_seqs * longest + (seqs - long_seqs) * context)
    return two_kinds(many, few, slots, piece) | {"keys": read} | spills(read)


def uneven_mixed(columns: Columns, tile: float, slots: float) -> Terms:
    """One prefill, and decodes of two lengths."""
    heads, kv_heads = attention_heads(columns)
    chunk, prefix = columns["chunk"], columns["prefix"]
    seqs, context = columns["num_decode"], columns["context"]
    long_seqs = np.rint(seqs * columns["long_share"])
    longest = context * columns["skew"]
    span, tiles = prefix + (np.minimum(chunk, tile) + chunk) / 2, ceil(chunk, tile)
    mean = (long_seqs * longest + (seqs - long_seqs) * context) / seqs
    terms = two_kinds((heads * tiles, span), (seqs * heads, mean), slots, prefix + chunk)
    terms["longest"] = np.maximum(prefix + chunk, longest)
    terms |= {"empty blocks": heads * seqs * (tiles - 1.0), "keys": kv_heads * seqs * mean}
    return terms | misses(columns, mean, slots)


def uneven_prefill(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    """Prefills by sums over their lengths."""
    tokens = columns["prompt_tokens"]
    return {
        "call": np.ones(len(tokens)),
        "tokens": tokens,
        "pairs": columns["squares"] / 2 + tokens * columns["prefix"],
        "longest": columns["longest"],
        "longest pairs": columns["longest"] * columns["longest"],
        "seqs": columns["num_seqs"],
    }
