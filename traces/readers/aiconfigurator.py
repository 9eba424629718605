"""Operator times of NVIDIA aiconfigurator: `OP_perf.parquet` (older: CSV, `OP_perf.txt`), one operator on one GPU.

Row: framework, version, device, op_name, kernel_source, the operator's shape, `latency` in milliseconds per call.
`step` of generation attention is the context length; of context modules the tokens already cached. `message_size` of
all_reduce counts elements (see `allreduce.py`), so it becomes bytes here.

`kernel_source` is what the engine chose for a shape. It splits the key only where one shape was measured with two of
them; elsewhere the choice is part of what the engine does, and a batch of another size may run another kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.allreduce import ELEMENT_BYTES
from kvtwin.traces.readers.columns import WideTable, is_parquet, read_parquet, read_wide_csv
from kvtwin.traces.readers.optable import OpTable, group_samples, op_table

_US_PER_MS: Final = 1e3
_WHOLE_FILE: Final = ("framework", "version", "device", "op_name")


@dataclass(frozen=True, slots=True)
class _Format:
    """Where an operator's columns belong: our name of each load column, and which columns are the model's shape."""

    work: str
    load: Mapping[str, str]
    shape: tuple[str, ...]


_ATTENTION: Final = ("num_heads", "num_key_value_heads")
_PREFILL: Final = {"batch_size": "num_seqs", "isl": "chunk", "step": "prefix"}
_DECODE: Final = {"batch_size": "num_decode", "step": "context"}
_FORMATS: Final[Mapping[str, _Format]] = {
    "context_attention": _Format("prefill_attention", _PREFILL, _ATTENTION),
    "generation_attention": _Format("decode_attention", _DECODE, _ATTENTION),
    "gemm": _Format("gemm", {"m": "m"}, ("n", "k")),
    "moe": _Format(
        "moe",
        {"num_tokens": "num_tokens"},
        ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    ),
    "all_reduce": _Format("transfer", {"message_size": "num_bytes"}, ("num_gpus",)),
}
# MLA, MSA, DSA ... come as whole modules, named context_* or generation_*.
_CONTEXT: Final = _Format("prefill_attention", _PREFILL, ("num_heads", "tp_size"))
_GENERATION: Final = _Format("decode_attention", _DECODE, ("num_heads", "tp_size"))


def read(path: Path) -> OpTable:
    """Read one file.

    Raises:
        InputError: neither Parquet nor CSV, a column missing, an operator unknown, two engines, GPUs or operators in one file;
            with row and column: a time that is not positive and finite, a size that is not a count.
    """
    table = read_parquet(path) if is_parquet(path) else read_wide_csv(path)
    facts = {name: _single(table, name) for name in ("framework", "device", "op_name")}
    versions = table.text("version")
    op = facts["op_name"]
    known = _format(op, path)
    time_us = table.times("latency") * _US_PER_MS
    load = {ours: table.sizes(name) for name, ours in known.load.items() if name in table.names}
    shape = {name: table.sizes(name) for name in known.shape if name in table.names}
    if known.work == "decode_attention":  # step counts the tokens before the new one
        load["context"] = load["context"] + 1
    if "allreduce_dtype" in table.names:
        load["num_bytes"] = load["num_bytes"] * _element_bytes(table)
    used = {*_WHOLE_FILE, *known.load, *known.shape, "latency", "kernel_source", "isl"}
    key: dict[str, npt.NDArray[Any]] = {"version": versions}
    key |= {name: table.text(name) for name in table.names if name not in used}
    if "kernel_source" in table.names:
        sources = table.text("kernel_source")
        if _decides(sources, [*key.values(), *shape.values(), *load.values()]):
            key["kernel_source"] = sources
    samples = group_samples(table, op, known.work, time_us, key=key, shape=shape, load=_varying(load))
    samples = [replace(sample, constants=_window(sample.key)) for sample in samples]
    found = {"hardware": facts["device"], "engine": facts["framework"].lower()}
    return op_table(path, "aiconfigurator", samples, found)


def _format(op: str, path: Path) -> _Format:
    if op in _FORMATS:
        return _FORMATS[op]
    for word, known in (("context", _CONTEXT), ("generation", _GENERATION)):
        if word in op:
            return known
    raise InputError(f"op_name {op!r} is unknown; known: {', '.join(_FORMATS)}, *context*, *generation*", path=path)


def _window(key: Mapping[str, str]) -> dict[str, float]:
    window = key.get("window_size", "0")
    return {"window_size": float(window)} if window.isdigit() and window != "0" else {}


def _single(table: WideTable, name: str) -> str:
    values = sorted(set(table.text(name).tolist()))
    if len(values) > 1:
        raise InputError(
            f"holds {', '.join(map(repr, values))}: one per file expected (split the file)",
            path=table.path,
            column=name,
        )
    return str(values[0])


def _varying(load: dict[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.int64]]:
    """Loads without a prefix column that is 0 throughout."""
    return {name: values for name, values in load.items() if name != "prefix" or values.any()}


def _element_bytes(table: WideTable) -> npt.NDArray[np.int64]:
    names = table.text("allreduce_dtype")
    table.require(
        np.isin(names, list(ELEMENT_BYTES)), "allreduce_dtype", f"unknown; known: {', '.join(ELEMENT_BYTES)}", names
    )
    return np.array([ELEMENT_BYTES[name] for name in names], np.int64)


def _decides(sources: npt.NDArray[Any], columns: list[npt.NDArray[Any]]) -> bool:
    """Whether one shape was measured with two kernels."""
    if len(set(sources.tolist())) == 1:
        return False
    seen: dict[tuple[Any, ...], str] = {}
    for source, *place in zip(sources, *columns, strict=True):
        if seen.setdefault(tuple(place), source) != source:
            return True
    return False
