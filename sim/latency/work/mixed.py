"""Attention of prefills and decodes in one launch."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, Terms, attention_heads, ceil, prefills
from kvtwin.sim.latency.work.lists import two_kinds
from kvtwin.sim.latency.work.schedule import MANY_SLOTS, PIECE

_SHARED_CACHES: Final = (32768.0, 65536.0, 131072.0, 196608.0, 262144.0, 393216.0)


def mixed_attention(columns: Columns, tile: float, slots: float) -> Terms:
    """Prefills with decodes in one launch: query heads are not packed and no context is split.

    Every decode gets as many blocks as a prefill, of which all but one find nothing to do.
    """
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], columns["context"]
    num_prefills, chunk, prefix = prefills(columns)
    span = prefix + (np.minimum(chunk, tile) + chunk) / 2
    tiles, whole = ceil(chunk, tile), ceil(context, PIECE) * PIECE
    terms = two_kinds((heads * num_prefills * tiles, span), (seqs * heads, whole), slots, prefix + chunk)
    terms |= {"empty blocks": heads * seqs * (tiles - 1.0), "keys": kv_heads * seqs * context}
    return terms | misses(columns, context, slots)


def misses(columns: Columns, context: FloatArray, slots: float) -> Terms:
    """Keys read from memory again by the query heads of a group, where a cache of each size does not hold them.

    Blocks go out head by head. Heads that run at once share what they read; where the blocks of a group take several
    rounds (group x decodes over slots, and one more, for they seldom start with a round), each round reads again what
    the cache no longer holds of the keys of all decodes under one head: everything, from twice its size on.
    """
    heads, kv_heads = attention_heads(columns)
    seqs, group = columns["num_decode"], heads / kv_heads
    again = np.minimum(group * seqs / (slots or MANY_SLOTS), group - 1.0)
    keys = seqs * context
    return {
        f"keys again over {int(size)}": kv_heads * again * keys * np.clip(keys / size - 1.0, 0.0, 1.0)
        for size in _SHARED_CACHES
    }
