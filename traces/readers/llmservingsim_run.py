"""Recorded runs of LLMServingSim's bench (a real vLLM): a folder with requests.jsonl(.gz) and meta.json.

    {"request_id": "bench-0", "input_toks": 2358, "output_toks": 531, "arrival_time": 1777142838.338653,
     "queued_ts": 479748.340626232, "scheduled_ts": ..., "first_token_ts": ..., "last_token_ts": ...}

Two clocks, both in seconds: `arrival_time` is epoch time of the front end, the others are the engine's monotonic
clock. Nothing ties them together, so they are laid over each other such that the smallest wait between arrival and
`queued_ts` of the run is 0: every wait read here is short by the unknown smallest one. 0 ns is the first arrival.
(timeseries.csv beside them is a 1 s log without per-step data; it is not read.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import MAX_TIME_NS, Row, find_file, provenance, read_json, read_jsonl
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

_STAMPS = {
    "arrival_time": "arrival_ns",
    "queued_ts": "queued_ns",
    "scheduled_ts": "scheduled_ns",
    "first_token_ts": "first_token_ns",
    "last_token_ts": "finish_ns",
}
_ALIGNMENT = (
    "arrival_time is epoch time, the other stamps are monotonic: aligned so that the smallest queued - arrival is 0; "
    "origin is the first arrival"
)


def read(path: Path) -> Run:
    """Read a run folder into a Run with requests (rows sorted by arrival).

    Raises:
        InputError: with file, row and column; also where the stamps of a row are not in order.
    """
    requests_file, meta_file = find_file(path, "requests.jsonl"), find_file(path, "meta.json")
    rows = [(row, _read_row(row)) for row in read_jsonl(requests_file, exact=True)]
    offset = min(times["queued_ns"] - times["arrival_ns"] for _, times in rows)
    origin = min(times["arrival_ns"] for _, times in rows)
    for row, times in rows:
        _align(row, times, offset, origin)
    rows.sort(key=lambda item: item[1]["arrival_ns"])
    columns = {name: [values[name] for _, values in rows] for name in rows[0][1]}
    meta = read_json(meta_file)
    kwargs = meta.get("engine_kwargs", {})
    if not isinstance(kwargs, dict):
        raise InputError("a JSON object expected", path=meta_file, column="engine_kwargs")
    source = provenance(path, "llmservingsim_run", [requests_file, meta_file], clocks=_ALIGNMENT)
    info = RunInfo(
        "recorded",
        engine=f"vllm {version}" if (version := _text(meta, "vllm_version", meta_file)) else None,
        model=_text(meta, "model", meta_file),
        engine_config=_engine_config(kwargs, meta.get("kv_cache")),
        source={**source, **{key: meta[key] for key in ("dataset_path", "dataset_hash", "started_at") if key in meta}},
    )
    return Run(info, {"requests": from_columns("requests", columns, requests_file)}, name=str(path))


def _engine_config(kwargs: dict[str, Any], kv_cache: Any) -> dict[str, Any]:
    """The engine's settings; newer recordings state the cache that vLLM settled on beside them (`kv_cache`)."""
    settings = {key: value for key, value in kwargs.items() if value is not None and key != "model"}
    if isinstance(kv_cache, dict):
        settings |= {key: kv_cache[key] for key in ("num_gpu_blocks", "block_size") if kv_cache.get(key) is not None}
    return settings


def _read_row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "request_id": row.text("request_id"),
        "input_tokens": row.tokens("input_toks"),
        "output_tokens": row.tokens("output_toks"),
    }
    for theirs, ours in _STAMPS.items():
        values[ours] = row.exact_seconds(theirs)
    return values


def _align(row: Row, times: dict[str, Any], offset: int, origin: int) -> None:
    """Move all stamps of a row to the run's clock, in place, and check their order."""
    times["arrival_ns"] -= origin
    before, last = "arrival_time", times["arrival_ns"]
    for theirs, ours in list(_STAMPS.items())[1:]:
        times[ours] -= offset + origin
        if times[ours] < last:
            row.fail(theirs, f"is {last - times[ours]} ns before {before}")
        if times[ours] > MAX_TIME_NS:
            row.fail(theirs, "is beyond the time that kvtwin can hold")
        before, last = theirs, times[ours]


def _text(meta: dict[str, Any], key: str, path: Path) -> str | None:
    value = meta.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError("a string expected", path=path, column=key)
    return value
