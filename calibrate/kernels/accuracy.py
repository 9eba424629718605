"""Hold-out errors of kernel tables, and their noise floor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.kernels.attention import Attention
from kvtwin.calibrate.kernels.table import Table
from kvtwin.calibrate.kernels.uneven import first_unsplit_of, slopes_of
from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.tables.calibrate import accuracy_of, fit_samples
from kvtwin.sim.latency.grid import Grid
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile
from kvtwin.traces.readers.optable import plain_samples


def kernel_accuracy(kernels: KernelProfile, model: ModelSpec, attention: Attention) -> dict[str, Any]:
    """Hold-out error of each table: whole values of an axis (contexts, chunks, sizes) left out in turn with all their rows.

    Never a random cell, which its neighbours of the same row would give away (`tables/holdout.py`).
    """
    dense = Table.of(kernels.dense)
    gemm = dense.where(dense.layer == ("gate_up_proj" if "gate_up_proj" in dense.layer else "qkv_proj"))
    product = plain_samples("largest GEMM", "tokens", {"num_tokens": gemm.tokens}, gemm.time_us)
    found: dict[str, Any] = {}
    for one in (*attention.fitted.values(), fit_samples(product, None)):
        found |= accuracy_of([one])
    return found | _uneven_accuracy(kernels, model, attention.decode) | _repeats(kernels)


def _uneven_accuracy(kernels: KernelProfile, model: ModelSpec, decode: Grid) -> dict[str, Any]:
    """Decodes of unequal contexts: slopes fitted without whole batch sizes, or whole short contexts, in turn.

    What equal contexts cost comes from attention.csv, as in the composed step, so its interpolation errors count too.
    """
    if kernels.skew is None:
        return {}
    skew = Table.of(kernels.skew)
    pure = skew.where((skew.pc == 0) & (skew.nb < skew.n))
    return {
        f"uneven decode attention, {what} held out": _uneven_held_out(
            pure, pure.columns[name], decode, first_unsplit_of(kernels, model)
        )
        for name, what in (("n", "number of decodes"), ("kvs", "context"))
    }


def _uneven_held_out(pure: Table, axis: npt.NDArray[Any], decode: Grid, split_below: int | None) -> dict[str, Any]:
    predicted = np.full(len(pure), np.nan)
    for value in np.unique(axis)[1:-1]:
        left_out = axis == value
        slopes = slopes_of(pure.where(~left_out), split_below)
        if slopes is None:
            continue
        rows = pure.where(left_out)
        longest = np.maximum(rows.kv_big, rows.kvs).astype(np.float64)
        mean = rows.kvs + (longest - rows.kvs) * rows.nb / rows.n
        share = np.sqrt(rows.nb / np.maximum(rows.n - rows.nb, 1))
        slope = slopes(
            *(np.clip(values, ax[0], ax[-1]) for values, ax in zip((rows.n, share), slopes.axes, strict=True))
        )
        predicted[left_out] = decode(rows.n, mean) + np.maximum(slope, 0.0) * (longest - mean)
    known = ~np.isnan(predicted)
    return summarize(pure.t_skew_us[known], predicted[known], groups=axis[known])


def _repeats(kernels: KernelProfile) -> dict[str, Any]:
    """Noise floor: shapes that skew.csv measured again (all decodes at its longest context) against attention.csv."""
    if kernels.skew is None:
        return {}
    skew, attention = Table.of(kernels.skew), Table.of(kernels.attention)
    known = {
        (int(c), int(p), int(n), int(k)): float(t)
        for c, p, n, k, t in zip(
            attention.prefill_chunk, attention.kv_prefill, attention.n_decode, attention.kv_decode, attention.time_us,
            strict=True,
        )
    }  # fmt: skip
    again = [
        (float(t), known[shape])
        for *place, t in zip(skew.pc, skew.kp, skew.n, skew.kv_big, skew.t_max_us, strict=True)
        if (shape := (int(place[0]), int(place[1]), int(place[2]), int(place[3]))) in known
    ]
    if not again:
        return {}
    first, second = np.array(again).T
    return {"attention measured twice (noise floor)": summarize(first, second)}
