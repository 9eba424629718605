"""Attention of several prefills that share a step: what a batch of short prompts costs beside one long one.

A step's prefills are priced by their tokens in all and by the (query, key) pairs in all. As many pairs as one chunk of so
many tokens has, or more, are one prefill with a prefix; fewer are several: `count` equal ones without a prefix
(LLMServingSim's profiler composes its batches so, `profiler/core/categories.py`, `_compose_prefill`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from kvtwin.calibrate.tables.calibrate import Fitted
from kvtwin.calibrate.tables.prices import relative_nnls
from kvtwin.sim.latency.grid import FloatArray, Grid

_LEAST_TOKENS: Final = 16.0  # of each: a shorter prompt costs what a kernel's tile of this many rows costs


def several_prefills(found: Fitted, tokens: FloatArray, constants: Mapping[str, float]) -> Grid:
    """One layer's attention in microseconds, by tokens of all prefills and their number.

    Args:
        found: prefill attention, fitted.
        tokens: the grid's first axis.
        constants: columns of the model that `found` may need (heads).
    """
    largest = max(2.0, float(tokens[-1]) / _LEAST_TOKENS)
    counts = np.array([1.0, *2.0 ** np.arange(1.0, np.ceil(np.log2(largest)) + 1.0)])
    total, count = (values.ravel() for values in np.meshgrid(tokens, counts, indexing="ij"))
    count = np.minimum(count, np.maximum(total / _LEAST_TOKENS, 1.0))
    time_us = _time_us(found, total, count, constants)
    return Grid([tokens.tolist(), counts.tolist()], time_us.reshape(len(tokens), len(counts)))


def _time_us(found: Fitted, tokens: FloatArray, count: FloatArray, constants: Mapping[str, float]) -> FloatArray:
    """As measured, where the tables have batches of several prefills; else one prefill's time by the share of its pairs."""
    ones, none = np.ones(len(tokens)), np.zeros(len(tokens))
    shape = {name: np.full(len(tokens), value) for name, value in constants.items() if name in found.samples.shape}
    load = found.samples.load
    if "prefill_key" in load:
        return found.model.time_us({**shape, "prefill_tokens": tokens, "prefill_key": tokens / (2.0 * count)})
    if len(np.unique(load.get("num_seqs", ones[:1]))) > 1:
        return found.model.time_us({**shape, "num_seqs": count, "chunk": tokens / count, "prefix": none})
    single_us = found.model.time_us({**shape, "num_seqs": ones, "chunk": tokens, "prefix": none})
    prices = relative_nnls(_terms(tokens, ones), single_us)
    whole, shared = (
        sum(price * terms[name] for name, price in prices.items())
        for terms in (_terms(tokens, ones), _terms(tokens, count))
    )
    return np.asarray(single_us * shared / whole)


def _terms(tokens: FloatArray, count: FloatArray) -> dict[str, FloatArray]:
    """What a launch, its queries and its (query, key) pairs cost. Richer physics says more of one prefill, and is further off here."""
    return {"call": np.ones(len(tokens)), "queries": tokens, "pairs": tokens * tokens / count / 2.0}
