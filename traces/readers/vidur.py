"""Operator times in Vidur's format, which Frontier and LLMServingSim v0 share: `time_stats.OP.{min,max,mean,median,std}`.

Times are milliseconds per call over some repeats; one row is one batch shape. Told apart by their other columns:

* linear operators: `num_tokens` x `num_tensor_parallel_workers`;
* attention: `batch_size`, `prefill_chunk_size`, `kv_cache_size` (tokens cached, of each), `is_prefill`: the other
  regime's operator stands at 0 or empty, which means "did not run"; so does an operator that is 0 throughout. In
  LLMServingSim v0 (no `block_size`) the decodes share `kv_cache_size` tokens: on the A6000 24 decodes take a step up at
  768, 1536, 2304 of them, 4 at 128, 256, 384, and where a decode's share is below one token the kernel has no work;
* mixtures of experts: `num_tokens`, `expert_parallel_size` ...;
* collectives: `size` in bytes, `num_workers`, `devices_per_node`.

Vidur's tracer counts whole microseconds, so the median of a 5 us kernel is off by up to 10 %. The mean of the repeats is
finer: it is the time here, unless the repeats scatter by more than 5 % (a first call's warm-up), where the median is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.columns import WideTable, read_wide_csv
from kvtwin.traces.readers.optable import FloatArray, IntArray, OpSamples, OpTable, group_samples, op_table

_US_PER_MS: Final = 1e3
_PREFIX: Final = "time_stats."
_SCATTER: Final = 0.05
_TRACER_STEP_US: Final = 1.0
# What is neither a size of a batch nor a time: kept apart by value, where the file has it.
_KEYS: Final = (
    "num_tensor_parallel_workers", "attention_backend", "profiling_precision", "quant_signature", "measurement_type",
    "expert_parallel_size", "routing_runtime_path", "gating_runtime_context", "profiling_patch_tag",
    "moe_grouped_gemm_backend", "routing_assignment_policy", "load_distribution", "model_arch", "n_embd", "n_q_head",
    "n_kv_head", "n_head", "n_expanded_embd", "block_size", "max_model_len", "vocab_size", "hidden_dim",
    "expert_hidden_dim", "num_experts", "num_experts_per_device", "router_topk",
)  # fmt: skip


def read(path: Path) -> OpTable:
    """Read one file.

    Raises:
        InputError: not such a table; with row and column: a time that is negative or not finite, or 0 where its
            operator ran, a size that is not a count.
    """
    table = read_wide_csv(path)
    ops = [name.split(".")[1] for name in table.names if name.startswith(_PREFIX) and name.endswith(".median")]
    if not ops:
        raise InputError(f"no {_PREFIX}OP.median column", path=path)
    samples: list[OpSamples] = []
    for op in ops:
        samples += [replace(sample, constants=_heads(sample.key)) for sample in _samples(table, op)]
    if not samples:
        raise InputError("only prefills mixed with decodes (mode true_mixed), too few kinds of which to fit", path=path)
    return op_table(path, "vidur", samples, {})


def _heads(key: Mapping[str, str]) -> dict[str, float]:
    """Heads on each GPU."""
    names = ("n_q_head", "n_kv_head", "num_tensor_parallel_workers")
    if not all(key.get(name, "").isdigit() for name in names):
        return {}
    heads, kv_heads, degree = (max(int(key[name]), 1) for name in names)
    return {"num_heads": float(max(heads // degree, 1)), "num_key_value_heads": float(max(kv_heads // degree, 1))}


def _samples(table: WideTable, op: str) -> list[OpSamples]:
    key: dict[str, npt.NDArray[Any]] = {name: table.text(name) for name in _KEYS if name in table.names}
    if "collective" in table.names:
        return _collective(table, op)
    if "prefill_chunk_size" in table.names:
        return _attention(table, op, key)
    ran = ~np.isnan(table.numbers(f"{_PREFIX}{op}.median"))
    return _group(table, op, "tokens", ran, key, {"num_tokens": table.sizes("num_tokens")})


def _collective(table: WideTable, op: str) -> list[OpSamples]:
    key = {name: table.text(name) for name in ("collective", "devices_per_node")}
    shape = {"num_gpus": table.sizes("num_workers")}
    ran = np.ones(len(table), np.bool_)
    return _group(table, op, "transfer", ran, key, {"num_bytes": table.sizes("size")}, shape)


def _attention(table: WideTable, op: str, key: dict[str, npt.NDArray[Any]]) -> list[OpSamples]:
    """Rows of the operator's own regime. Cache writes and reshapes run in both, by number of new tokens."""
    median = table.numbers(f"{_PREFIX}{op}.median")
    if not np.any(median > 0):  # never measured
        return []
    if "is_prefill" in table.names:
        prefill = np.array([text.lower() == "true" for text in table.text("is_prefill")], np.bool_)
    else:
        prefill = table.sizes("prefill_chunk_size") > 0  # as LLMServingSim's predictor tells them
    mode = table.text("mode") if "mode" in table.names else np.full(len(table), "even", dtype=object)
    key = {**key, "mode": mode}
    batch, chunk, cached = (table.sizes(name) for name in ("batch_size", "prefill_chunk_size", "kv_cache_size"))
    lengths, mixed = _lengths(table, mode)
    if op == "attn_prefill":
        return _prefill(table, op, key, prefill & ~mixed & ~_not_run(median), batch, chunk, cached, lengths)
    if op == "attn_decode":
        keep = ~prefill & ~mixed & ~_not_run(median)
        context = "context" if "block_size" in table.names else "total_context"
        return _group(table, op, "decode_attention", keep, key, {"num_decode": batch, context: cached})
    new = np.where(prefill, np.maximum(batch * chunk, lengths.sum(axis=1)), batch)
    keep = (median > 0) & ~mixed & (new > 0)
    return _group(table, op, "tokens", keep, key, {"num_tokens": new})


def _not_run(median: FloatArray) -> npt.NDArray[np.bool_]:
    return np.isnan(median)


def _prefill(
    table: WideTable,
    op: str,
    key: dict[str, npt.NDArray[Any]],
    keep: npt.NDArray[np.bool_],
    batch: IntArray,
    chunk: IntArray,
    cached: IntArray,
    lengths: IntArray,
) -> list[OpSamples]:
    """Prefills: even ones by (requests, chunk, prefix), uneven ones by their sums, as `BatchStats` sees them."""
    total = lengths.sum(axis=1)
    longest = lengths.max(axis=1)
    uneven = (longest * np.maximum((lengths > 0).sum(axis=1), 1) != total) & (total > 0)
    each = np.where(chunk > 0, chunk, np.where(batch > 0, total // np.maximum(batch, 1), 0))
    even = keep & ~uneven & (each > 0)
    found = _group(table, op, "prefill_attention", even, key, {"num_seqs": batch, "chunk": each, "prefix": cached})
    load = {"num_seqs": batch, "prompt_tokens": total, "longest": longest, "squares": (lengths**2).sum(axis=1)}
    return found + _group(table, f"{op}_uneven", "uneven_prefill", keep & uneven, key, {**load, "prefix": cached})


def _lengths(table: WideTable, mode: npt.NDArray[Any]) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """New tokens of each request, shape (n, largest batch), 0 where there is none; and rows of prefill with decode."""
    mixed = np.asarray(mode == "true_mixed", np.bool_)
    if "seq_lens" not in table.names:
        return np.zeros((len(table), 1), np.int64), mixed
    lists: list[list[int]] = []
    for row, text in zip(table.rows().tolist(), table.text("seq_lens").tolist(), strict=True):
        try:
            lists.append([int(value) for value in json.loads(text or "[]")])
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{text!r} is not a list of lengths", path=table.path, row=row, column="seq_lens"
            ) from error
    padded = np.zeros((len(lists), max(map(len, lists)) or 1), np.int64)
    for at, values in enumerate(lists):
        padded[at, : len(values)] = values
    return padded, mixed


def _group(
    table: WideTable,
    op: str,
    work: str,
    keep: npt.NDArray[np.bool_],
    key: dict[str, npt.NDArray[Any]],
    load: dict[str, IntArray],
    shape: dict[str, IntArray] | None = None,
) -> list[OpSamples]:
    name = op.removesuffix("_uneven")
    median = table.numbers(f"{_PREFIX}{name}.median")
    mean, std = (_if_there(table, f"{_PREFIX}{name}.{stat}") for stat in ("mean", "std"))
    good = np.isfinite(median) & (median > 0) & ~(mean <= 0)
    table.require(good | ~keep, f"{_PREFIX}{name}.median", "a positive, finite time expected (milliseconds)", median)
    spread = np.divide(std, mean, out=np.full(len(mean), np.nan), where=keep & (mean > 0))
    time_us = np.where(spread <= _SCATTER, mean, median) * _US_PER_MS
    return group_samples(
        table, op, work, time_us, key=key, shape=shape or {}, load=load, keep=keep, spread=spread,
        resolution_us=_resolution_us(median[keep]),
    )  # fmt: skip


def _if_there(table: WideTable, name: str) -> FloatArray:
    return table.numbers(name) if name in table.names else np.full(len(table), np.nan)


def _resolution_us(median_ms: FloatArray) -> float:
    """1 where every median is a multiple of half a microsecond (the middle of two), else 0: a finer timer."""
    half = median_ms * _US_PER_MS * 2
    return _TRACER_STEP_US if len(half) and np.all(np.abs(half - np.rint(half)) < 1e-6 * np.maximum(half, 1)) else 0.0
