"""Kernel profiles of LLMServingSim: a folder (.../bf16) with meta.yaml and tpN/{attention,dense,...}.csv(.gz).

Times are microseconds per kernel call. One trap: `skew.csv` gives the SUM of `measurement_iterations` calls (its
header says microseconds; 13,000 shapes it shares with attention.csv show the factor), so its times are divided here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import Columns, find_file, find_optional, provenance, read_csv, read_lines

_ATTENTION: Final[Mapping[str, type]] = {
    "prefill_chunk": int,
    "kv_prefill": int,
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
_TYPES: Final = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_ALPHA: Final = "alpha"  # a ratio: noise makes some negative, and where t_max = t_mean there is none


@dataclass(frozen=True)
class KernelProfile:
    """Kernel times of one model on one GPU at one tensor-parallel degree; all times in microseconds per call.

    Attributes:
        path: the profile folder (the one with meta.yaml).
        tensor_parallel_size: which tpN was read.
        meta: meta.yaml, as it is.
        attention: prefill_chunk, kv_prefill (tokens of prefix under the chunk), n_decode (sequences), kv_decode
            (tokens of context of each), time_us: one layer's attention for that batch.
        dense: layer, tokens, time_us: one call.
        per_sequence: layer, sequences, time_us: one call (lm_head, sampler).
        skew: decodes of unequal context: n sequences, nb of them at kv_big tokens, the others at kvs; t_mean_us at the
            mean context, t_max_us all at the largest, t_skew_us as it is, and
            alpha = (t_skew - t_mean) / (t_max - t_mean), null where undefined; None where the profile has no skew.csv.
        moe: tokens, activated_experts, time_us (ep: expert-parallel degree, in newer profiles); None for dense models.
        source: provenance: path, reader, digest of each file.
        digest: SHA-256 over the digests of all files read, for a Profile's key.
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


def read_kernel_profile(path: Path, tensor_parallel_size: int) -> KernelProfile:
    """Read and check the tables of one tensor-parallel degree.

    Raises:
        InputError: no such degree (names those that exist); a file missing; with file, row and column: a time that is
            not positive and finite, a negative size.
    """
    meta_file = find_file(path, "meta.yaml")
    meta = read_meta(meta_file)
    folder = _tp_folder(path, tensor_parallel_size)
    skew_file, moe_file = find_optional(folder, "skew.csv"), find_optional(folder, "moe.csv")
    attention_file, dense_file = find_file(folder, "attention.csv"), find_file(folder, "dense.csv")
    per_sequence_file = find_file(folder, "per_sequence.csv")
    files = [meta_file, attention_file, dense_file, per_sequence_file, *filter(None, (skew_file, moe_file))]
    source = provenance(path, "llmservingsim_profile", files, tensor_parallel_size=tensor_parallel_size)
    return KernelProfile(
        path=path,
        tensor_parallel_size=tensor_parallel_size,
        meta=meta,
        attention=_read_table(attention_file, _ATTENTION),
        dense=_read_table(dense_file, _DENSE),
        per_sequence=_read_table(per_sequence_file, _PER_SEQUENCE),
        skew=_read_table(skew_file, _SKEW, divide_by=measurement_iterations(meta, meta_file)) if skew_file else None,
        moe=_read_table(moe_file, _MOE, optional={"ep": int}) if moe_file else None,
        source=source,
        digest=hashlib.sha256(json.dumps(source["sha256"]).encode()).hexdigest(),
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


def _read_table(
    path: Path, kinds: Mapping[str, type], optional: Mapping[str, type] | None = None, divide_by: int = 1
) -> pa.Table:
    columns = read_csv(path, kinds, optional, blank=_ALPHA)
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
