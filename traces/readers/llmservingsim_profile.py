"""Kernel profiles of LLMServingSim: a folder (.../bf16) with meta.yaml and tpN/{attention,dense,...}.csv(.gz).

Times are microseconds per kernel call. One trap: `skew.csv` gives the SUM of `measurement_iterations` calls (its
header says microseconds; 13,000 shapes it shares with attention.csv show the factor), so its times are divided here.

Newer profiles (vLLM 0.28) give a batch's prefills as `prefill_key`, the keys that a query sees, averaged over the queries
(`profiler/core/attention_shape.py`): here its excess over half of the chunk, which is the prefix where it is one prefill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.columns import csv_header
from kvtwin.traces.readers.text import Columns, find_file, find_optional, provenance, read_csv, read_lines

_ATTENTION: Final[Mapping[str, type]] = {
    "prefill_chunk": int,
    "n_decode": int,
    "kv_decode": int,
    "time_us": float,
}
_DENSE: Final[Mapping[str, type]] = {"layer": str, "tokens": int, "time_us": float}
_PER_SEQUENCE: Final[Mapping[str, type]] = {"layer": str, "sequences": int, "time_us": float}
_MOE: Final[Mapping[str, type]] = {"tokens": int, "activated_experts": int, "time_us": float}
_SKEW: Final[Mapping[str, type]] = {
    "regime": str,
    "n": int,
    "nb": int,
    "ratio": float,
    "skew": float,
    "pc": int,
    "kp": int,
    "kvs": int,
    "kv_big": int,
    "kv_mean": float,
    "t_mean_us": float,
    "t_max_us": float,
    "t_skew_us": float,
    "alpha": float,
}
_KERNEL: Final[Mapping[str, type]] = {"layer": str, "decode_q_len": int}  # of newer attention tables
_PROTOCOL: Final[Mapping[str, type]] = {"measurement_protocol": str, "measurement_sha256": str}
_TYPES: Final = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_ALPHA: Final = "alpha"  # a ratio: noise makes some negative, and where t_max = t_mean there is none


@dataclass(frozen=True)
class KernelProfile:
    """Kernel times of one model on one GPU at one tensor-parallel degree; all times in microseconds per call.

    Attributes:
        path: the profile folder (the one with meta.yaml).
        tensor_parallel_size: which tpN was read.
        meta: meta.yaml, as it is.
        attention: prefill_chunk (new tokens of all prefills), kv_prefill (tokens of prefix under the chunk; below 0 where
            several prefills share the tokens, so that a query sees fewer keys than half of them), n_decode (sequences),
            kv_decode (tokens of context of each), time_us: one layer's attention for that batch.
        dense: layer, tokens, time_us: one call.
        per_sequence: layer, sequences, time_us: one call (lm_head, sampler).
        skew: decodes of unequal context: n sequences, nb of them at kv_big tokens, the others at kvs; t_mean_us at the
            mean context, t_max_us all at the largest, t_skew_us as it is, and
            alpha = (t_skew - t_mean) / (t_max - t_mean), null where undefined; None where the profile has no skew.csv, or a
            newer one with lists of requests (`notes` says so).
        moe: tokens, activated_experts, time_us (ep: expert-parallel degree, in newer profiles); None for dense models.
        source: provenance: path, reader, digest of each file.
        digest: SHA-256 over the digests of all files read, for a Profile's key.
        notes: what there is and was not read.
    """

    path: Path
    tensor_parallel_size: int
    meta: Mapping[str, Any]
    attention: pa.Table
    dense: pa.Table
    per_sequence: pa.Table
    skew: pa.Table | None
    moe: pa.Table | None
    source: Mapping[str, Any]
    digest: str
    notes: tuple[str, ...] = ()


def read_kernel_profile(path: Path, tensor_parallel_size: int) -> KernelProfile:
    """Read and check the tables of one tensor-parallel degree.

    Raises:
        InputError: no such degree (names those that exist); a file missing; several attention kernels or linear attention
            (not composed yet); with file, row and column: a time that is not positive and finite, a negative size.
    """
    meta_file = find_file(path, "meta.yaml")
    meta = read_meta(meta_file)
    folder = _tp_folder(path, tensor_parallel_size)
    if linear := find_optional(folder, "linear_attention.csv"):
        raise InputError("steps of a model with linear attention are not composed", path=linear)
    skew_file, moe_file = find_optional(folder, "skew.csv"), find_optional(folder, "moe.csv")
    notes = []
    if skew_file and "requests_json" in csv_header(skew_file):
        notes.append(f"{skew_file.name} lists requests, which is not read: uneven contexts cost what their mean costs")
        skew_file = None
    attention_file, dense_file = find_file(folder, "attention.csv"), find_file(folder, "dense.csv")
    per_sequence_file = find_file(folder, "per_sequence.csv")
    files = [meta_file, attention_file, dense_file, per_sequence_file, *filter(None, (skew_file, moe_file))]
    source = provenance(path, "llmservingsim_profile", files, tensor_parallel_size=tensor_parallel_size)
    return KernelProfile(
        path=path,
        tensor_parallel_size=tensor_parallel_size,
        meta=meta,
        attention=_attention(attention_file),
        dense=_read_table(dense_file, _DENSE),
        per_sequence=_read_table(per_sequence_file, _PER_SEQUENCE),
        skew=_read_table(skew_file, _SKEW, divide_by=measurement_iterations(meta, meta_file)) if skew_file else None,
        moe=_read_table(moe_file, _MOE, optional={"ep": int}) if moe_file else None,
        source=source,
        digest=hashlib.sha256(json.dumps(source["sha256"]).encode()).hexdigest(),
        notes=tuple(notes),
    )


def read_meta(path: Path) -> dict[str, Any]:
    """meta.yaml as plain values. Raises InputError where it is no mapping of them."""
    import yaml

    text = "\n".join(line for _, line in read_lines(path))
    try:
        meta = yaml.safe_load(text)  # plain values only: safe_load refuses every tag that would build an object
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML of plain values ({error})", path=path) from error
    if not isinstance(meta, dict):
        raise InputError("a YAML mapping expected", path=path)
    return meta


def measurement_iterations(meta: Mapping[str, Any], path: Path) -> int:
    """Calls that each time of skew.csv sums. Raises InputError where meta.yaml does not say."""
    value = meta.get("measurement_iterations")
    if type(value) is not int or value < 1:
        problem = f"{value!r}: a positive integer expected (skew.csv holds the sum of that many calls)"
        raise InputError(problem, path=path, column="measurement_iterations")
    return value


def _tp_folder(path: Path, tensor_parallel_size: int) -> Path:
    folder = path / f"tp{tensor_parallel_size}"
    if not folder.is_dir():
        found = sorted(item.name for item in path.glob("tp*") if item.is_dir())
        raise InputError(f"no tp{tensor_parallel_size} here; found: {', '.join(found) or 'none'}", path=path)
    return folder


def _attention(path: Path) -> pa.Table:
    """Attention of decodes of one query each, by the columns of older tables."""
    if "prefill_key" not in csv_header(path):
        return _plain_attention(_read_table(path, {**_ATTENTION, "kv_prefill": int}, _KERNEL), path)
    table = _read_table(path, {**_ATTENTION, "prefill_key": float}, _KERNEL)
    chunk, key = table.column("prefill_chunk"), table.column("prefill_key")
    prefix = pc.if_else(pc.greater(chunk, 0), pc.subtract(key, pc.divide(pc.cast(chunk, pa.float64()), 2.0)), 0.0)
    return _plain_attention(table.drop_columns(["prefill_key"]).append_column("kv_prefill", prefix), path)


def _plain_attention(table: pa.Table, path: Path) -> pa.Table:
    kernels = sorted(set(table.column("layer").to_pylist())) if "layer" in table.column_names else []
    if len(kernels) > 1:
        raise InputError(
            f"{len(kernels)} kernels ({', '.join(kernels)}): such a model's steps are not composed", path=path
        )
    if "decode_q_len" in table.column_names:
        table = table.filter(pc.equal(table.column("decode_q_len"), 1))
    return table.select(["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"])


def _read_table(
    path: Path, kinds: Mapping[str, type], optional: Mapping[str, type] | None = None, divide_by: int = 1
) -> pa.Table:
    columns = read_csv(path, kinds, {**(optional or {}), **_PROTOCOL}, blank=_ALPHA)
    arrays = {}
    for name, kind in {**kinds, **(optional or {})}.items():
        if name not in columns.values:
            continue
        values = columns[name]
        if name.endswith("_us"):
            columns.require(values > 0, name, "us: a positive time expected")
            values = values / divide_by
        elif kind is not str and name != _ALPHA:
            columns.require(values >= 0, name, "is negative")
        arrays[name] = pa.array(values, _TYPES[kind], from_pandas=True)
    if kinds is not _SKEW:  # skew.csv is a list of samples, the others are tables to look up in
        _refuse_repeats(columns, [name for name in arrays if not name.endswith("_us")], path)
    return pa.table(arrays)


def _refuse_repeats(columns: Columns, keys: list[str], path: Path) -> None:
    """Refuse two times for one shape (upstream averages repeats): interpolation would not know which to take."""
    seen: set[tuple[Any, ...]] = set()
    for row, *shape in zip(columns.rows, *(columns[name].tolist() for name in keys), strict=True):
        if tuple(shape) in seen:
            raise InputError(f"the shape {dict(zip(keys, shape, strict=True))} occurs twice", path=path, row=row)
        seen.add(tuple(shape))


__all__ = ["KernelProfile", "measurement_iterations", "read_kernel_profile", "read_meta"]
