"""Single tables of an LLMServingSim kernel profile: attention, dense, per_sequence, moe and skew, as operator samples.

The same files that `llmservingsim_profile.py` reads as a folder, with its units and its traps; meta.yaml two folders
above a table says engine, GPU and model, and the tpN folder its tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.columns import WideTable, read_wide_csv
from kvtwin.traces.readers.llmservingsim_profile import measurement_iterations, read_meta
from kvtwin.traces.readers.optable import OpSamples, OpTable, group_samples, op_table
from kvtwin.traces.readers.text import find_optional

_ATTENTION: Final = {
    "prefill_chunk": "chunk", "kv_prefill": "prefix", "n_decode": "num_decode", "kv_decode": "context",
}  # fmt: skip
_SKEW: Final = {"pc": "chunk", "kp": "prefix", "n": "num_decode", "kvs": "context"}


def read(path: Path) -> OpTable:
    """Read one table.

    Raises:
        InputError: none of the five tables; skew.csv without the meta.yaml that says how many calls its times sum; with
            row and column: a time that is not positive and finite, a size that is not a count.
    """
    table = read_wide_csv(path)
    meta_file = find_optional(path.resolve().parent.parent, "meta.yaml")
    meta = read_meta(meta_file) if meta_file else {}
    key = {"tensor_parallel_size": np.full(len(table), _degree(path), dtype=object)}
    names = set(table.names)
    if "prefill_chunk" in names:
        samples = _attention(table, key)
    elif "t_skew_us" in names:
        if meta_file is None:
            raise InputError(
                "skew.csv sums several calls; put meta.yaml beside its tpN folder to say how many", path=path
            )
        samples = _skew(table, key, measurement_iterations(meta, meta_file))
    elif "activated_experts" in names:
        load = {"num_tokens": table.sizes("tokens"), "activated_experts": table.sizes("activated_experts")}
        samples = group_samples(table, "moe", "moe", table.times("time_us"), key=key, shape={}, load=load)
    else:
        samples = _layers(table, key, "sequences" if "sequences" in names else "tokens")
    files = [path, meta_file] if meta_file else [path]
    return op_table(path, "llmservingsim_tables", samples, _facts(meta), files)


def _degree(path: Path) -> str:
    folder = path.resolve().parent.name
    return folder.removeprefix("tp") if folder.startswith("tp") and folder[2:].isdigit() else ""


def _facts(meta: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "hardware": meta.get("gpu") or meta.get("hardware"),
        "model": meta.get("model"),
        "engine": f"vllm {meta['vllm_version']}" if meta.get("vllm_version") else None,
        "variant": meta.get("variant"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _attention(table: WideTable, key: Mapping[str, Any]) -> list[OpSamples]:
    columns = {ours: table.sizes(name) for name, ours in _ATTENTION.items()}
    times = table.times("time_us")
    prefill, decode = columns["chunk"] > 0, columns["num_decode"] > 0
    table.require(prefill | decode, "prefill_chunk", "and no decodes: an empty batch has no time", columns["chunk"])
    found = []
    for op, work, keep, names in (
        ("decode attention", "decode_attention", ~prefill, ("num_decode", "context")),
        ("prefill attention", "prefill_attention", ~decode, ("chunk", "prefix")),
        ("mixed attention", "mixed_attention", prefill & decode, ("chunk", "prefix", "num_decode", "context")),
    ):
        load = {name: columns[name] for name in names}
        found += group_samples(table, op, work, times, key=key, shape={}, load=load, keep=keep)
    return found


def _skew(table: WideTable, key: Mapping[str, Any], iterations: int) -> list[OpSamples]:
    """Decodes of two lengths: a share `long_share` of num_decode has `skew` times the `context` of the others."""
    columns: dict[str, npt.NDArray[Any]] = {ours: table.sizes(name) for name, ours in _SKEW.items()}
    longest = table.sizes("kv_big")
    table.require(columns["context"] > 0, "kvs", "a context of 1 token or more expected", columns["context"])
    columns["skew"] = longest / columns["context"]
    table.require(columns["num_decode"] > 0, "n", "one decode or more expected", columns["num_decode"])
    columns["long_share"] = table.sizes("nb") / columns["num_decode"]
    times = table.times("t_skew_us") / iterations
    pure = columns["chunk"] == 0
    found = []
    for op, keep, names in (
        ("uneven decode attention", pure, ("num_decode", "long_share", "context", "skew")),
        ("uneven mixed attention", ~pure, tuple(columns)),
    ):
        load = {name: columns[name] for name in names}
        work = "uneven_decode" if op.startswith("uneven decode") else "uneven_mixed"
        found += group_samples(table, op, work, times, key=key, shape={}, load=load, keep=keep)
    return found


def _layers(table: WideTable, key: Mapping[str, Any], size: str) -> list[OpSamples]:
    layers, times = table.text("layer"), table.times("time_us")
    load = {"num_tokens": table.sizes(size)}
    found = []
    for layer in sorted(set(layers.tolist())):
        keep = np.asarray(layers == layer, np.bool_)
        found += group_samples(table, layer, "tokens", times, key=key, shape={}, load=load, keep=keep)
    return found
