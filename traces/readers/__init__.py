"""Readers of public formats: one file each, `read(path) -> Run`.

`READERS` maps a format's name to its reader, `detect` names the format of a path, `read_run` does both. Tables that
are not runs have readers of their own: `llmservingsim_profile.read_kernel_profile`, `allreduce.read_allreduce`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import (
    azure2023,
    kvtwin_jsonl,
    llmservingsim_run,
    llmservingsim_workload,
    mooncake,
    sglang_log,
    tair,
    vllm_bench,
    vllm_recording,
)
from kvtwin.traces.readers.peers import blis, sglang_simulator
from kvtwin.traces.readers.peers import llmservingsim as llmservingsim_requests
from kvtwin.traces.readers.peers import vidur as vidur_requests
from kvtwin.traces.readers.summary import is_summary
from kvtwin.traces.readers.text import find_optional, read_json, read_jsonl, read_lines
from kvtwin.traces.run import INFO_FILE, MAX_HASH_BLOCK_TOKENS, Run

READERS: Final[Mapping[str, Callable[..., Run]]] = {
    "kvtwin": Run.open,
    "kvtwin_jsonl": kvtwin_jsonl.read,
    "vllm_recording": vllm_recording.read,
    "sglang_log": sglang_log.read,
    "llmservingsim_run": llmservingsim_run.read,
    "llmservingsim_workload": llmservingsim_workload.read,
    "mooncake": mooncake.read,
    "tair": tair.read,
    "azure2023": azure2023.read,
    "vllm_bench": vllm_bench.read,
    "llmservingsim_requests": llmservingsim_requests.read,
    "vidur_requests": vidur_requests.read,
    "blis": blis.read,
    "sglang_simulator": sglang_simulator.read,
}

# Formats that leave open how many tokens a block hash stands for; their readers take `hash_block_tokens`.
_OPEN_BLOCK_SIZE: Final = ("kvtwin_jsonl", "llmservingsim_workload", "tair")

# Fields that only one JSON-lines format has (all of them must be there), most telling first.
_JSONL_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "mooncake": frozenset({"timestamp", "input_length", "hash_ids"}),
    "sglang_log": frozenset({"type", "sglang", "case", "fields"}),
    "tair": frozenset({"component", "type", "trigger_time_us"}),
    "llmservingsim_workload": frozenset({"input_toks", "arrival_time_ns"}),
    "kvtwin_jsonl": frozenset({"request_id", "input_length"}),
    "vllm_bench": frozenset({"input_lens", "output_lens", "ttfts", "itls"}),
    "blis": frozenset({"completed_requests", "ttft_mean_ms", "requests"}),
    "sglang_simulator": frozenset({"rid", "created_time", "gen_token_latencies"}),
}
# How the header line of a CSV format begins, without blanks.
_CSV_HEADERS: Final[Mapping[str, str]] = {
    "azure2023": "TIMESTAMP,ContextTokens,GeneratedTokens",
    "llmservingsim_requests": "instanceid,requestid,model,input,output,arrival,end_time,",
    "vidur_requests": "RequestId,request_e2e_time,",
}


def read_run(path: str | os.PathLike[str], format_name: str | None = None, hash_block_tokens: int | None = None) -> Run:
    """Read a run or workload of any known format; without a name, `detect` finds it.

    `hash_block_tokens` replaces the default of the formats that leave it open.

    Raises:
        InputError: unknown format, a block size for a format that fixes it, or whatever its reader finds wrong.
    """
    name = format_name or detect(path)
    if name not in READERS:
        raise InputError(f"unknown format {name!r}; known: {', '.join(READERS)}", path=path)
    if hash_block_tokens is None:
        return READERS[name](Path(path))
    if name not in _OPEN_BLOCK_SIZE:
        problem = f"the format {name} fixes the tokens per block hash; only {', '.join(_OPEN_BLOCK_SIZE)} leave it open"
        raise InputError(problem, path=path)
    if not 1 <= hash_block_tokens <= MAX_HASH_BLOCK_TOKENS:
        raise InputError(f"{hash_block_tokens} tokens per block hash: 1 to {MAX_HASH_BLOCK_TOKENS} expected", path=path)
    return READERS[name](Path(path), hash_block_tokens=hash_block_tokens)


def detect(path: str | os.PathLike[str]) -> str:
    """Name the format of a path, by the files of a folder or the first line of a file.

    Raises:
        InputError: nothing there, or no known format.
    """
    place = Path(path)
    if not place.exists():
        raise InputError("no such file or folder", path=place)
    name = _detect_folder(place) if place.is_dir() else _detect_file(place)
    if name is None and is_summary(place):
        problem = (
            "holds aggregates (means, quantiles), where every request is needed: they can only be what is predicted"
        )
        raise InputError(f"{problem} (kvtwin validate e2e RECORDED {place.name})", path=place)
    if name is None:
        raise InputError(f"not a format that kvtwin reads; known: {', '.join(READERS)}", path=place)
    return name


def _detect_folder(folder: Path) -> str | None:
    if (folder / INFO_FILE).is_file():
        return "kvtwin"
    if find_optional(folder, "requests.jsonl") is None:
        return None
    if find_optional(folder, "steps.jsonl") is not None:
        return "vllm_recording"
    return "llmservingsim_run" if find_optional(folder, "meta.json") is not None else None


def _detect_file(path: Path) -> str | None:
    first = next((line for _, line in islice(read_lines(path), 1)), "")
    header = first.replace(" ", "")
    if not header.startswith("{"):
        return next((name for name, start in _CSV_HEADERS.items() if header.startswith(start)), None)
    fields = set(read_json(path) if header == "{" else next(islice(read_jsonl(path), 1)).values)
    return next((name for name, needed in _JSONL_FIELDS.items() if needed <= fields), None)


__all__ = ["READERS", "detect", "read_run"]
