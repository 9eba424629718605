"""Event logs of Tair KVCacheManager (github.com/alibaba/tair-kvcache): one JSON object per line.

    {"component": "cache_manager", "type": "GetCacheLocation", "trigger_time_us": 1763975741548745, "keys": [...],
     "block_mask": 1, ...}
    {"component": "cache_manager", "type": "StartWriteCache", "trigger_time_us": ..., "keys": [...], "write_session_id": ...}
    {"component": "cache_manager", "type": "FinishWriteCache", "trigger_time_us": ..., "success_block": 12, ...}

A lookup is a request: its keys name the blocks of its prompt, the last of them partial, and `block_mask` says how many
leading ones the engine itself held already (`cached_tokens`). The next write that begins with the same whole blocks is
the request's: what it adds to them, a token at least, counts as its output. Requests have no names: they become "r0", "r1", ...

How many tokens a key stands for is not in the log (it is told when an instance registers): one, so that all lengths are
in blocks, unless `hash_block_tokens` is given. The `cache` table of the run is that of `cache_events`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtwin.traces.readers.cache_events import read_tair_events, tair_keys
from kvtwin.traces.readers.text import MAX_TOKENS, Row, provenance, read_jsonl
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_US

_COLUMNS = ("request_id", "arrival_ns", "input_tokens", "output_tokens", "cached_tokens", "block_hashes")


def read(path: Path, *, hash_block_tokens: int = 1) -> Run:
    """Read a log as a workload with cache events.

    Raises:
        InputError: with file, row and column; also where lookups are not sorted by time, or there is none.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    open_rows: list[int] = []  # lookups whose write has not come
    first_us = None
    for row in read_jsonl(path):
        kind, time_us = row.text("type"), row.integer("trigger_time_us", 0, 1 << 53)
        first_us = time_us if first_us is None else first_us
        if kind == "GetCacheLocation":
            open_rows.append(len(columns["request_id"]))
            _add_lookup(columns, row, time_us - first_us, hash_block_tokens)
        elif kind == "StartWriteCache":
            _add_output(columns, open_rows, tair_keys(row), hash_block_tokens)
    info = RunInfo("workload", hash_block_tokens=hash_block_tokens, source=provenance(path, "tair", [path]))
    tables = {"requests": from_columns("requests", columns, path), "cache": read_tair_events(path)}
    return Run(info, tables, name=str(path))


def _add_lookup(columns: dict[str, list[Any]], row: Row, time_us: int, block_tokens: int) -> None:
    keys = tair_keys(row)
    if not keys or len(keys) * block_tokens > MAX_TOKENS:
        row.fail("keys", f"{len(keys)} blocks of {block_tokens} tokens: 1 to {MAX_TOKENS} tokens expected")
    time_ns = time_us * NS_PER_US
    if time_ns < (columns["arrival_ns"][-1] if columns["arrival_ns"] else 0):
        row.fail("trigger_time_us", "the lookup is before the row above: sort the file by time")
    mask = row.values.get("block_mask")
    cached = None if type(mask) is not int or not 0 <= mask <= len(keys) else mask * block_tokens
    values = (f"r{len(columns['arrival_ns'])}", time_ns, len(keys) * block_tokens, 1, cached, keys)
    for name, value in zip(_COLUMNS, values, strict=True):
        columns[name].append(value)


def _add_output(columns: dict[str, list[Any]], open_rows: list[int], written: list[int], block_tokens: int) -> None:
    """The latest lookup whose whole blocks begin a write is the one that it answers."""
    for place in range(len(open_rows) - 1, -1, -1):
        row = open_rows[place]
        whole = columns["block_hashes"][row][:-1]
        if written[: len(whole)] == whole:
            columns["output_tokens"][row] = max(1, (len(written) - len(whole)) * block_tokens)
            del open_rows[place]
            return
