"""Cache event traces, read into the `cache` table: what was looked up, found, stored and dropped, on which level.

Known, by what the first line holds:

* a Run folder with `cache.parquet`;
* Tair KVCacheManager's event log (`"component": "cache_manager"`): GetCacheLocation, StartWriteCache, FinishWriteCache,
  one block key each. The log does not say what a lookup found; a hit is a leading key that an earlier finished write
  has stored (the log has no evictions);
* KV-cache events that vLLM and SGLang publish, as JSON lines or msgpack (`kv_events.py`);
* decision logs of SGLang's HiCache (`hi_*` of the oracle): loads, copies, backups, prefetches and evictions in tokens.
  Such a log names a load by the depth at which it ends, not by its request: it counts as the hit of the first request
  of the batch whose hit ends there.

Times count from the first event.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.kv_events import is_msgpack, read_batches
from kvtwin.traces.readers.text import Row, read_jsonl, read_lines
from kvtwin.traces.run import Run
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_S, NS_PER_US

_HASH_MASK: Final = (1 << 64) - 1
_COLUMNS: Final = ("time_ns", "level", "kind", "request", "tokens", "block_hash")
HBM, HOST, STORAGE = 1, 2, 3
_MEDIA: Final[Mapping[str, int]] = {"GPU": HBM, "CPU": HOST}


class _Events:
    """Rows of the table to be."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._first_ns: int | None = None

    def add(
        self, time_ns: int, level: int, kind: str, *, tokens: int | None = None, block: int | None = None,
        request: int | None = None,
    ) -> None:  # fmt: skip
        if self._first_ns is None:
            self._first_ns = time_ns
        values = (time_ns - self._first_ns, level, kind, request, tokens, block)
        for name, value in zip(_COLUMNS, values, strict=True):
            self.columns[name].append(value)


def read_cache_events(path: Path) -> pa.Table:
    """Read a cache event trace of any known format; returns a table of schema.CACHE.

    Raises:
        InputError: no known format, or with file and row: what is wrong in a line.
    """
    if path.is_dir():
        return Run.open(path).cache
    if not path.exists():
        raise InputError("no such file or folder", path=path)
    events = _Events()
    _reader(path)(path, events)
    if not events.columns["time_ns"]:
        raise InputError("no cache event in it", path=path)
    return from_columns("cache", events.columns, path)


def _reader(path: Path) -> Callable[[Path, _Events], None]:
    if is_msgpack(path):
        return _read_published
    first = next(iter(read_jsonl(path)), None)
    values = {} if first is None else first.values
    if values.get("component") == "cache_manager":
        return _read_tair
    if "events" in values:
        return _read_published
    if values.get("type") == "meta" and "sglang" in values:
        return _read_hicache
    raise InputError("not a cache event trace that kvtwin reads: Tair, vLLM KV events, HiCache log, run", path=path)


def _read_tair(path: Path, events: _Events) -> None:
    stored: set[int] = set()
    writing: dict[str, list[int]] = {}
    for row in read_jsonl(path):
        kind = row.text("type")
        time_ns = row.integer("trigger_time_us", 0, 1 << 53) * NS_PER_US
        if kind == "GetCacheLocation":
            keys = tair_keys(row)
            hits = next((place for place, key in enumerate(keys) if key not in stored), len(keys))
            for place, key in enumerate(keys):
                events.add(time_ns, STORAGE, "lookup", block=key)
                if place < hits:
                    events.add(time_ns, STORAGE, "hit", block=key)
        elif kind == "StartWriteCache":
            writing[row.text("write_session_id")] = tair_keys(row)
        elif kind == "FinishWriteCache":
            keys = writing.pop(row.text("write_session_id"), [])
            for key in keys[: row.integer("success_block", 0, 1 << 31)]:
                if key not in stored:
                    stored.add(key)
                    events.add(time_ns, STORAGE, "store", block=key)


def tair_keys(row: Row) -> list[int]:
    """The block keys of a Tair event, signed 64-bit numbers there, as unsigned ones."""
    keys = row.get("keys")
    if not isinstance(keys, list) or not all(type(key) is int for key in keys):
        row.fail("keys", "a list of integers expected")
    return [key & _HASH_MASK for key in keys]


def _read_published(path: Path, events: _Events) -> None:
    live: dict[int, set[int]] = {}
    for row in read_batches(path):
        time_ns = round(row.seconds("ts") * NS_PER_S)
        for event in row.get("events"):
            level = _MEDIA.get(str(event.get("medium") or "GPU").upper(), STORAGE)
            held = live.setdefault(level, set())
            kind = event.get("type")
            if kind == "AllBlocksCleared":
                for block in sorted(held):
                    events.add(time_ns, level, "evict", block=block)
                held.clear()
                continue
            hashes = event.get("block_hashes")
            if kind not in ("BlockStored", "BlockRemoved") or not isinstance(hashes, list):
                row.fail("events", f"{kind!r} with block_hashes {hashes!r}: BlockStored or BlockRemoved expected")
            size = event.get("block_size")
            for block in map(_hash, hashes):
                tokens = size if type(size) is int and size > 0 else None
                events.add(time_ns, level, "store" if kind == "BlockStored" else "evict", block=block, tokens=tokens)
                (held.add if kind == "BlockStored" else held.discard)(block)


def _hash(value: Any) -> int:
    if type(value) is int:
        return value & _HASH_MASK
    text = value if isinstance(value, bytes) else str(value).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# Kinds of the oracle's HiCache events: level, kind, and where the tokens stand. A refused copy or load has 0 tokens.
_HICACHE: Final[Mapping[str, tuple[int, str, int]]] = {
    "w": (HOST, "store", 2), "l": (HBM, "load_back", 2), "s": (STORAGE, "store", 2), "p": (STORAGE, "prefetch_start", 3),
    "v": (STORAGE, "prefetch_drop", 3), "q": (STORAGE, "prefetch_done", 3),
}  # fmt: skip


def _read_hicache(path: Path, events: _Events) -> None:
    requests = _Requests()
    for row, text in read_lines(path):
        try:
            line = json.loads(text)
            if isinstance(line, list) and line[0] != "R":
                _add_hicache_step(line, requests, events)
        except (ValueError, IndexError, TypeError) as error:
            problem = f"not a line of a HiCache decision log ({error})"
            raise InputError(problem, path=path, row=row) from error


class _Requests:
    """Which requests have been admitted, and what prefetches have brought those that still wait."""

    def __init__(self) -> None:
        self._admitted: set[int] = set()
        self._fetched: dict[int, int] = {}

    def add_hits(self, line: list[Any], events: _Events) -> None:
        """A request's lookup, and on which level each part of its hit was."""
        time_ns, moves = line[4], line[19]
        self._fetched |= {event[2]: event[3] for event in moves if event[0] == "q"}
        loads = {event[3]: event[2] for event in moves if event[0] == "l" and event[2]}
        for request, cached, new in line[5]:
            loaded = loads.pop(cached, 0)
            if request in self._admitted:  # later chunks find what earlier ones computed
                continue
            self._admitted.add(request)
            events.add(time_ns, HBM, "lookup", tokens=cached + new, request=request)
            from_storage = min(loaded, self._fetched.get(request, 0))
            for level, tokens in (HBM, cached - loaded), (HOST, loaded - from_storage), (STORAGE, from_storage):
                if tokens:
                    events.add(time_ns, level, "hit", tokens=tokens, request=request)


def _add_hicache_step(line: list[Any], requests: _Requests, events: _Events) -> None:
    time_ns = line[4]
    if line[3] != "D":
        requests.add_hits(line, events)
    for _, _, length, _ in line[16]:
        events.add(time_ns, HBM, "evict", tokens=length)
    for event in line[19]:
        if event[0] in _HICACHE and (event[0] != "p" or event[4]):
            level, kind, place = _HICACHE[event[0]]
            if event[place]:
                events.add(time_ns, level, kind, tokens=event[place])
    for _, _, freed in line[20]:
        if freed:
            events.add(time_ns, HOST, "evict", tokens=freed)
