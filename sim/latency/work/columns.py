"""Columns of a batch: heads, lengths and prefills, by whichever names a table has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kvtwin.sim.latency.grid import FloatArray

Columns = Mapping[str, FloatArray]
Terms = dict[str, FloatArray]
Work = Callable[[Columns, float, float], Terms]


def ceil(top: FloatArray, bottom: float | FloatArray) -> FloatArray:
    """How many of `bottom` hold `top`."""
    value: FloatArray = np.ceil(top / bottom)
    return value


def waves_of(blocks: FloatArray, slots: float) -> FloatArray:
    """Rounds that `blocks` need; slots = 0 stands for a device that is never partly full."""
    return ceil(blocks, slots) if slots else blocks


def column(columns: Columns, name: str, default: float) -> FloatArray:
    """A column, or its default where the table has none."""
    found = columns.get(name)
    return found if found is not None else np.full(len(next(iter(columns.values()))), default)


def attention_heads(columns: Columns) -> tuple[FloatArray, FloatArray]:
    """Query and key-value heads; a table without them has one model, whose heads are in the prices or in `slots`."""
    heads = column(columns, "num_heads", 1.0)
    return heads, column(columns, "num_key_value_heads", 0.0) if "num_key_value_heads" in columns else heads


def context_of_each(columns: Columns) -> FloatArray:
    """Tokens of context of each decode.

    Some tables hold what all of them have together (`total_context`), or means over the generation of `output_tokens`.
    """
    if "context" in columns:
        return columns["context"]
    if "output_tokens" in columns:
        return columns["prompt_tokens"] + np.floor(columns["output_tokens"] / 2.0)
    return np.maximum(np.floor(columns["total_context"] / columns["num_decode"]), 1.0)


def prefills(columns: Columns) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Prefills of a batch: how many, new tokens of each, cached tokens of each.

    Some tables say what all of them have together: `prefill_tokens`, and `prefill_key`, the keys that a query sees, averaged
    over the queries. That stands for as few equal prefills as can have so short a past (LLMServingSim, `_compose_prefill`).
    """
    if "prefill_key" not in columns:
        return column(columns, "num_seqs", 1.0), columns["chunk"], column(columns, "prefix", 0.0)
    tokens, key = columns["prefill_tokens"], columns["prefill_key"]
    seqs = np.maximum(ceil(tokens, 2.0 * key), 1.0)
    chunk = tokens / seqs
    return seqs, chunk, np.maximum(key - chunk / 2, 0.0)


def pooled(columns: Columns) -> dict[str, FloatArray]:
    """Columns in which attention of models with different heads is alike: group, blocks and length, of shape (n,).

    A GPU sees thread blocks: 8 requests of a model with 4 key-value heads are 16 requests of one with 2 (decodes pack a
    group's queries into one block; prefills have a block for each query head).
    """
    heads, kv_heads = attention_heads(columns)
    if "num_decode" in columns:
        blocks, length = columns["num_decode"] * kv_heads, context_of_each(columns)
    else:
        seqs, length, _ = prefills(columns)
        blocks = seqs * heads
    return {"group": heads / kv_heads, "blocks": blocks, "length": length}


def windowed(length: FloatArray, columns: Columns, extra: float) -> FloatArray:
    """Keys seen through a sliding window (window_size 0: no window)."""
    window = column(columns, "window_size", 0.0)
    return np.where(window > 0, np.minimum(length, window + extra), length)
