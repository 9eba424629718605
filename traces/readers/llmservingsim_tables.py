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

_PREFILL: Final = {"prefill_chunk": "chunk", "kv_prefill": "prefix"}
_DECODE: Final = {"n_decode": "num_decode", "kv_decode": "context"}
_ORDINARY: Final = {"layer": "attention", "decode_q_len": "1"}
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
        if "ep" in names:
            key["expert_parallel_size"] = table.text("ep")
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
    """Older files have one prefill a batch and its prefix; newer ones several prefills, and the keys that they see.

    Newer ones also have several kernels (`layer`) and decodes of several queries (`decode_q_len`): keys, never averaged over.
    """
    prefills = _attention_prefills(table)
    decodes = {ours: table.sizes(name) for name, ours in _DECODE.items()}
    has_prefill, has_decode = next(iter(prefills.values())) > 0, decodes["num_decode"] > 0
    table.require(
        has_prefill | has_decode,
        "prefill_chunk",
        "and no decodes: an empty batch has no time",
        table.sizes("prefill_chunk"),
    )
    times, key = table.times("time_us"), {**key, **_kernel(table)}
    found = []
    for op, work, keep, load in (
        ("decode attention", "decode_attention", ~has_prefill, decodes),
        ("prefill attention", "prefill_attention", ~has_decode, prefills),
        ("mixed attention", "mixed_attention", has_prefill & has_decode, {**prefills, **decodes}),
    ):
        found += group_samples(table, op, work, times, key=key, shape={}, load=load, keep=keep)
    return found


def _attention_prefills(table: WideTable) -> dict[str, npt.NDArray[Any]]:
    if "prefill_key" not in table.names:
        return {ours: table.sizes(name) for name, ours in _PREFILL.items()}
    tokens, keys = table.sizes("prefill_chunk"), table.numbers("prefill_key")
    table.require(
        (keys > 0) | (tokens == 0), "prefill_key", "the keys that a prefill's query sees expected, above 0", keys
    )
    return {"prefill_tokens": tokens, "prefill_key": keys}


def _kernel(table: WideTable) -> dict[str, npt.NDArray[Any]]:
    """What newer attention tables tell apart, unless it is all as in older ones."""
    texts = {name: table.text(name) for name in _ORDINARY if name in table.names}
    return {name: values for name, values in texts.items() if set(values.tolist()) != {_ORDINARY[name]}}


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
