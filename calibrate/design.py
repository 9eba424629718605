"""Which batches to measure next: the ones that shrink the doubt of the predictions most."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.regression import design
from kvtwin.sim.latency.stats import BatchStats, IntArray

NUM_BATCHES: Final = 20
_RIDGE: Final = 1e-3  # of the prior: without it a feature that was never seen is infinitely uncertain


@dataclass(frozen=True)
class Limits:
    """The largest batches an engine makes.

    Attributes:
        max_num_seqs, max_num_batched_tokens, max_model_len: vLLM's settings.
        capacity_tokens: tokens that the KV cache holds.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    capacity_tokens: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], batches: BatchStats) -> Limits:
        """From a recording's engine settings; what they do not say, from the largest recorded batches."""
        context = batches.decode_context + batches.prefill_context + batches.num_tokens
        capacity = int(settings.get("num_gpu_blocks") or 0) * int(settings.get("block_size") or 16)
        longest = max(
            int(batches.decode_context_max.max()), int((batches.prefill_context + batches.prefill_tokens).max())
        )
        return cls(
            max_num_seqs=int(settings.get("max_num_seqs") or batches.num_reqs.max()),
            max_num_batched_tokens=int(settings.get("max_num_batched_tokens") or batches.num_tokens.max()),
            max_model_len=int(settings.get("max_model_len") or max(longest, 2)),
            capacity_tokens=capacity or int(context.max()),
        )


def candidates(limits: Limits) -> IntArray:
    """A grid of batches: int64 of shape (n, 4): decodes, context of each, prefill chunk (0: none), its context.

    Powers of two up to the limits, with the limits themselves; what the engine cannot do is left out.
    """
    decodes = [0, *_ladder(1, limits.max_num_seqs)]
    contexts = _ladder(16, limits.max_model_len - 1)
    chunks = [0, *_ladder(16, limits.max_num_batched_tokens)]
    prefixes = [0, *_ladder(256, limits.max_model_len - 1)]
    rows = [
        (n, context if n else 0, chunk, prefix if chunk else 0)
        for n, context, chunk, prefix in itertools.product(decodes, contexts, chunks, prefixes)
    ]
    grid = np.unique(np.array(rows, np.int64), axis=0)
    n, context, chunk, prefix = grid.T
    possible = (
        (n + chunk > 0)
        & (n + (chunk > 0) <= limits.max_num_seqs)
        & (n + chunk <= limits.max_num_batched_tokens)
        & (chunk + prefix <= limits.max_model_len)
        & (n * (context + 1) + chunk + prefix <= limits.capacity_tokens)
        & (chunk != 1)
    )
    found: IntArray = grid[possible]
    return found


def _ladder(low: int, high: int) -> list[int]:
    steps = [1 << power for power in range(low.bit_length() - 1, max(high, 1).bit_length()) if 1 << power < high]
    return [*steps, high] if high >= 1 else []


def batches_of(grid: IntArray) -> BatchStats:
    """Statistics of `candidates`' rows."""
    n, context, chunk, prefix = grid.T
    return BatchStats(
        np.column_stack(
            [n, n * context, n * context * context, np.where(n > 0, context, 0), chunk > 0, chunk, prefix,
             chunk * prefix + chunk * (chunk + 1) // 2, chunk * chunk]
        ).astype(np.int64)
    )  # fmt: skip


def next_batches(
    features: Sequence[str], coefficients: FloatArray, known: FloatArray, limits: Limits, *, noise: float
) -> dict[str, Any]:
    """The batches whose measurement shrinks the mean variance of all predictions most, one after the other.

    Greedy V-optimal design (Fedorov 1972, chapter 2): with the information matrix M of what was measured, the batch x
    lowers the sum of variances over the grid, sum_t x_t' M^-1 x_t, by sum_t (x_t' M^-1 x)^2 / (1 + x' M^-1 x). Rows
    are relative to the predicted latency, as the noise is. Every batch is picked and counted once; the doubt that is
    left is a statement about the prices, never about a wrong form of the model.

    Args:
        features: of the fit, k names.
        coefficients: nanoseconds per unit, shape (k,); those of 0 take part: measuring may raise them.
        known: relative rows of the measured batches, shape (n, k).
        limits: of the engine.
        noise: relative standard deviation of one measurement.

    Returns:
        `batches`: 20 of them, as numbers of decodes with the context of each, and a prefill chunk with its prefix;
        `relative_sd`: of the predictions over the grid, mean and worst, before and after measuring these.
    """
    grid = candidates(limits)
    columns = design(batches_of(grid), features)
    size = np.maximum(columns.max(axis=0, initial=0.0), 1.0)
    predicted = columns @ coefficients
    predicted = np.maximum(predicted, 1e-3 * float(np.median(predicted)))
    rows = columns / predicted[:, None] / (1 / np.median(predicted)) / size
    seen = known / (1 / np.median(predicted)) / size
    inverse = np.linalg.inv(seen.T @ seen + _RIDGE * np.eye(len(size)))
    before = _spread(rows, inverse, noise)
    picked: list[int] = []
    for _ in range(min(NUM_BATCHES, len(grid))):
        gain = ((rows @ inverse @ rows.T) ** 2).sum(axis=0) / (1 + _variance(rows, inverse))
        gain[picked] = 0.0
        best = int(np.argmax(gain))
        picked.append(best)
        column = inverse @ rows[best]
        inverse = inverse - np.outer(column, column) / (1 + rows[best] @ column)
    names = ("num_decode", "decode_cache_len", "prefill_input_len", "prefill_cache_len")
    return {
        "batches": [dict(zip(names, grid[row].tolist(), strict=True)) for row in picked],
        "relative_sd": {"before": before, "after": _spread(rows, inverse, noise)},
    }


def _variance(rows: FloatArray, inverse: FloatArray) -> FloatArray:
    found: FloatArray = np.einsum("ij,jk,ik->i", rows, inverse, rows, optimize=True)
    return found


def _spread(rows: FloatArray, inverse: FloatArray, noise: float) -> dict[str, float]:
    sd = noise * np.sqrt(np.maximum(_variance(rows, inverse), 0.0))
    return {"mean": float(sd.mean()), "worst": float(sd.max())}
