"""Recordings of a real vLLM: our engine recordings and the oracle's scheduler logs, one folder each.

    trace.jsonl(.gz)      what was asked (format of `kvtwin_jsonl`)
    config.json           engine settings that differ from the defaults; `hash_id_tokens`
    requests.jsonl(.gz)   what each request saw
    steps.jsonl(.gz)      what each engine step did
    summary.json, timing.json   optional: engine version and counts

Two clocks meet in an engine recording (origin: the start of the run). `arrival_ns` is when the client sent the
request (`due_s`); `queued_ns` when the scheduler got it (the file's `arrival_ns`). First token and finish are there
twice: `client_*` as the client saw them, and as the engine had them, from the steps (when the scheduler had taken the
token in). An oracle log has one, virtual clock, and no input queue: its `queued_ns` is null. Its engine settings are those of its driver where config.json has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import kvtwin_jsonl
from kvtwin.traces.readers.text import (
    MAX_TIME_NS,
    MAX_TOKENS,
    Row,
    find_file,
    find_optional,
    provenance,
    read_json,
    read_jsonl,
)
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import from_seconds

_DEFAULT_HASH_TOKENS = 512  # the oracle driver's `hash_id_tokens`
# What the oracle's config.json leaves out: DEFAULTS of its drive_scheduler.py.
_ORACLE_SETTINGS: Final[Mapping[str, Any]] = {
    "num_gpu_blocks": 4096, "block_size": 16, "max_num_seqs": 128, "max_num_batched_tokens": 2048,
    "max_model_len": 8192, "enable_chunked_prefill": True, "enable_prefix_caching": False,
    "long_prefill_token_threshold": 0, "policy": "fcfs", "watermark": 0.0, "scheduler_reserve_full_isl": True,
    "async_scheduling": False,
}  # fmt: skip


def read(path: Path) -> Run:
    """Read a recording folder into a Run with requests and steps.

    Raises:
        InputError: with file, row and column; also where the files do not name the same requests.
    """
    trace_file, config_file = find_file(path, "trace.jsonl"), find_file(path, "config.json")
    requests_file, steps_file = find_file(path, "requests.jsonl"), find_file(path, "steps.jsonl")
    summary_file = find_optional(path, "summary.json", "timing.json")
    config = read_json(config_file)
    hash_tokens = _positive(config, "hash_id_tokens", _DEFAULT_HASH_TOKENS, config_file)
    block_size = _positive(config, "block_size", _ORACLE_SETTINGS["block_size"], config_file)
    columns = _request_columns(kvtwin_jsonl.parse(trace_file, hash_tokens), requests_file)
    hashes, hash_tokens_used = kvtwin_jsonl.block_hashes(columns.pop("_asked"), hash_tokens, token_block=block_size)
    steps = _read_steps(steps_file, {name: row for row, name in enumerate(columns["request_id"])})
    from_steps = {**_first_admissions(steps, len(columns["request_id"])), **_token_times(steps, columns)}
    columns = {**from_steps, **columns, "block_hashes": hashes}
    summary = read_json(summary_file) if summary_file else {}
    version = summary.pop("vllm", None)
    files = [file for file in (trace_file, config_file, requests_file, steps_file, summary_file) if file]
    info = RunInfo(
        "recorded",
        engine=f"vllm {version}" if isinstance(version, str) else None,
        hash_block_tokens=hash_tokens_used,
        engine_config=config if "queued_ns" in columns else {**_ORACLE_SETTINGS, **config},
        source=provenance(path, "vllm_recording", files),
        metrics=summary,
    )
    tables = {
        "requests": from_columns("requests", columns, requests_file),
        "steps": from_columns("steps", steps, steps_file),
    }
    return Run(info, tables, name=str(path))


def _positive(config: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise InputError(f"{value!r}: a positive number of tokens expected", path=path, column=key)
    return value


def _request_columns(asked: list[kvtwin_jsonl.Request], path: Path) -> dict[str, Any]:
    """Columns of the requests file, sorted by arrival (ties in the order of the trace), and the trace's requests in
    the same order under "_asked".
    """
    order = {request.request_id: request for request in asked}
    seen: dict[str, dict[str, Any]] = {}
    read_times = _seen_by_oracle
    for row in read_jsonl(path):
        if row.number == 1 and row.has("due_s"):
            read_times = _seen_by_client
        name = row.text("request_id")
        if name in seen or name not in order:
            row.fail("request_id", f"{name!r} occurs twice" if name in seen else f"{name!r} is not in the trace")
        seen[name] = {**read_times(row), **_lengths(row, order[name])}
    missing = [name for name in order if name not in seen]
    if missing:
        raise InputError(f"{missing[0]!r} of the trace is missing here", path=path, column="request_id")
    asked = sorted(asked, key=lambda request: seen[request.request_id]["arrival_ns"])
    rows = [seen[request.request_id] for request in asked]
    return {
        "request_id": [request.request_id for request in asked],
        "priority": [request.priority for request in asked],
        **{name: [row[name] for row in rows] for name in rows[0]},
        "_asked": asked,
    }


def _lengths(row: Row, asked: kvtwin_jsonl.Request) -> dict[str, int]:
    lengths = {"input_tokens": row.tokens("input_length"), "output_tokens": row.tokens("output_length")}
    for column, value, expected in (
        ("input_length", lengths["input_tokens"], asked.input_tokens),
        ("output_length", lengths["output_tokens"], asked.output_tokens),
    ):
        if value != expected:
            row.fail(column, f"{value} differs from the trace ({expected})")
    return lengths


def _seen_by_client(row: Row) -> dict[str, int]:
    due_ns = from_seconds(row.seconds("due_s"))
    times = {
        "arrival_ns": due_ns,
        "queued_ns": row.nanoseconds("arrival_ns"),
        "client_first_token_ns": due_ns + from_seconds(row.seconds("ttft_s")),
        "client_finish_ns": due_ns + from_seconds(row.seconds("e2e_s")),
    }
    if times["client_finish_ns"] < times["client_first_token_ns"]:
        row.fail("e2e_s", "is shorter than ttft_s")
    if times["client_finish_ns"] > MAX_TIME_NS:
        row.fail("e2e_s", "ends beyond the time that kvtwin can hold")
    return times


def _seen_by_oracle(row: Row) -> dict[str, int]:
    names = {
        "arrival_ns": "arrival_ns",
        "first_scheduled_ns": "scheduled_ns",
        "first_token_ns": "first_token_ns",
        "finish_ns": "finish_ns",
    }
    times = {ours: row.nanoseconds(theirs) for theirs, ours in names.items()}
    for (before, first), (after, second) in zip(list(names.items())[:-1], list(names.items())[1:], strict=True):
        if times[second] < times[first]:
            row.fail(after, f"{times[second]} is before {before} ({times[first]})")
    return {
        **times,
        "cached_tokens": row.count("num_cached_tokens"),
        "num_preemptions": row.count("num_preemptions"),
    }


_STEP_TIMES = {"sched_ns": "t_sched_ns", "start_ns": "t_start_ns", "end_ns": "t_end_ns", "update_ns": "t_update_ns"}
_STEP_COUNTS = {
    "num_waiting": "num_waiting",
    "num_running": "num_running",
    "num_free_blocks": "free_blocks",
    "num_evicted_blocks": "evicted_blocks",
}
_OPTIONAL = {"t_sched_ns", "t_update_ns", "evicted_blocks"}


def _read_steps(path: Path, row_of: Mapping[str, int]) -> dict[str, list[Any]]:
    """Columns of the steps table. `row_of` gives a request's row."""
    names = ("step", *_STEP_TIMES, *_STEP_COUNTS, "request", "cache_len", "input_len", "preempted", "finished")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for index, row in enumerate(read_jsonl(path)):
        if row.integer("step", 0, MAX_TIME_NS) != index:
            row.fail("step", f"{row.get('step')} where {index} is next")
        columns["step"].append(index)
        for ours, theirs in _STEP_TIMES.items():
            columns[ours].append(row.nanoseconds(theirs) if _is_due(row, theirs) else None)
        for ours, theirs in _STEP_COUNTS.items():
            columns[ours].append(row.count(theirs) if _is_due(row, theirs) else None)
        if columns["end_ns"][-1] < columns["start_ns"][-1]:
            row.fail("t_end_ns", f"{columns['end_ns'][-1]} is before t_start_ns ({columns['start_ns'][-1]})")
        _append_batch(columns, row, row_of)
        for name in ("preempted", "finished"):
            columns[name].append([_row_of(row, name, item, row_of) for item in _list(row, name)])
    return columns


def _is_due(row: Row, name: str) -> bool:
    """Whether the row must give the field: some versions and modes of the recorder leave some out."""
    return name not in _OPTIONAL or row.has(name)


def _append_batch(columns: dict[str, list[Any]], row: Row, row_of: Mapping[str, int]) -> None:
    requests, cache_lens, input_lens = [], [], []
    for entry in _list(row, "scheduled"):
        if not isinstance(entry, list) or len(entry) != 3:
            row.fail("scheduled", "an entry is not [request_id, tokens before, new tokens]")
        name, cache_len, input_len = entry
        requests.append(_row_of(row, "scheduled", name, row_of))
        cache_lens.append(_tokens(row, cache_len, 0))
        input_lens.append(_tokens(row, input_len, 1))
    columns["request"].append(requests)
    columns["cache_len"].append(cache_lens)
    columns["input_len"].append(input_lens)


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        row.fail(name, "is not a list")
    return value


def _row_of(row: Row, column: str, name: Any, row_of: Mapping[str, int]) -> int:
    if not isinstance(name, str) or name not in row_of:
        row.fail(column, f"{str(name)[:40]!r} is not a request of this recording")
    return row_of[name]


def _tokens(row: Row, value: Any, low: int) -> int:
    if type(value) is not int or not low <= value <= MAX_TOKENS:
        row.fail("scheduled", f"{str(value)[:40]} tokens: an integer from {low} to {MAX_TOKENS} expected")
    return value


def _first_admissions(steps: Mapping[str, list[Any]], num_requests: int) -> dict[str, list[int | None]]:
    """What the steps say of each request: first schedule() call, cache hit then, number of preemptions."""
    scheduled: list[int | None] = [None] * num_requests
    cached: list[int | None] = [None] * num_requests
    preemptions: list[int | None] = [0] * num_requests
    for sched_ns, requests, cache_lens, preempted in zip(
        steps["sched_ns"], steps["request"], steps["cache_len"], steps["preempted"], strict=True
    ):
        for request, cache_len in zip(requests, cache_lens, strict=True):
            if cached[request] is None:
                scheduled[request], cached[request] = sched_ns, cache_len
        for request in preempted:
            preemptions[request] = (preemptions[request] or 0) + 1
    return {"scheduled_ns": scheduled, "cached_tokens": cached, "num_preemptions": preemptions}


def _token_times(steps: Mapping[str, list[Any]], columns: Mapping[str, Any]) -> dict[str, list[int | None]]:
    """When the engine had each request's first and last token; null for a request that the steps leave unfinished.

    A step yields a token for each member whose last known token it computes.
    """
    known = list(columns["input_tokens"])
    total = [prompt + output for prompt, output in zip(columns["input_tokens"], columns["output_tokens"], strict=True)]
    first: list[int | None] = [None] * len(known)
    finish: list[int | None] = [None] * len(known)
    names = ("end_ns", "update_ns", "request", "cache_len", "input_len")
    for end_ns, update_ns, *members in zip(*(steps[name] for name in names), strict=True):
        now_ns = end_ns if update_ns is None else update_ns
        for request, cache_len, input_len in zip(*members, strict=True):
            if cache_len + input_len < known[request]:
                continue
            known[request] += 1
            first[request] = now_ns if first[request] is None else first[request]
            if known[request] == total[request]:
                finish[request] = now_ns
    return {"first_token_ns": first, "finish_ns": finish}
