"""Cache event traces, read into the `cache` table: what was looked up, found, stored and dropped, on which level.

Known, by what the first line holds:

* a run of any format with cache events; without, one that says what its requests hit (`cached_tokens`, on which level
  `cached_host_tokens`, `cached_storage_tokens`): a lookup and its hits when the request is scheduled; without these, a
  workload of block hashes, such as Mooncake's: what an endless cache would find and store, one event per block;
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
import pyarrow.compute as pc

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.kv_events import is_msgpack, read_batches
from kvtwin.traces.readers.text import Row, read_jsonl, read_lines
from kvtwin.traces.run import Run
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_S, NS_PER_US
from kvtwin.traces.workload import prefix_nodes

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
    if not path.exists():
        raise InputError("no such file or folder", path=path)
    events = _Events()
    reader = None if path.is_dir() else _reader(path)
    if reader is None:
        run = _read_run(path)
        if run.has("cache"):
            return run.cache
        _add_run(run, events, path)
    else:
        reader(path, events)
    return _table(events, path)


def read_tair_events(path: Path) -> pa.Table:
    """The events of a file that is Tair's, whatever it looks like; see `read_cache_events`."""
    events = _Events()
    _read_tair(path, events)
    return _table(events, path)


def _table(events: _Events, path: Path) -> pa.Table:
    if not events.columns["time_ns"]:
        raise InputError("no cache event in it", path=path)
    return from_columns("cache", events.columns, path)


def _reader(path: Path) -> Callable[[Path, _Events], None] | None:
    """Who reads a file of cache events; None: it may be a run."""
    if is_msgpack(path):
        return _read_published
    text = next((line for _, line in read_lines(path)), "")
    if not text.startswith("{") or text == "{":
        return None
    values = next(read_jsonl(path)).values
    if values.get("component") == "cache_manager":
        return _read_tair
    if "events" in values:
        return _read_published
    if values.get("type") == "meta" and "sglang" in values:
        return _read_hicache
    return None


def _read_run(path: Path) -> Run:
    from kvtwin.traces.readers import detect, read_run  # they read Tair's log with this file's help

    try:
        name = detect(path)
    except InputError as error:
        known = "Tair, KV events, HiCache log, run, trace with block hashes"
        raise InputError(f"not a cache event trace that kvtwin reads: {known}", path=path) from error
    return read_run(path, name)


def _add_run(run: Run, events: _Events, path: Path) -> None:
    requests = run.requests
    if requests.column("cached_tokens").null_count < requests.num_rows:
        _add_recorded_hits(requests, events)
    elif run.info.hash_block_tokens and requests.column("block_hashes").null_count < requests.num_rows:
        _add_endless_cache(requests, run.info.hash_block_tokens, events)
    else:
        raise InputError("neither cache events, nor cached_tokens, nor block hashes of its requests", path=path)


def _add_recorded_hits(requests: pa.Table, events: _Events) -> None:
    """What requests looked up and hit, by the time they were scheduled."""
    levels = ("cached_tokens", "cached_host_tokens", "cached_storage_tokens")
    times = pc.coalesce(requests.column("scheduled_ns"), requests.column("arrival_ns")).to_pylist()
    prompts = requests.column("input_tokens").to_pylist()
    hits = list(zip(*(requests.column(name).to_pylist() for name in levels), strict=True))
    for request in sorted(range(len(times)), key=times.__getitem__):
        total, host, storage = hits[request]
        if total is None:
            continue
        events.add(times[request], HBM, "lookup", tokens=prompts[request], request=request)
        found = (HBM, total - (host or 0) - (storage or 0)), (HOST, host), (STORAGE, storage)
        for level, tokens in found:
            if tokens:
                events.add(times[request], level, "hit", tokens=tokens, request=request)


def _add_endless_cache(requests: pa.Table, block_tokens: int, events: _Events) -> None:
    """What requests, one by one by arrival, find of the prompts before them."""
    stored: set[int] = set()
    columns = (requests.column(name).to_pylist() for name in ("arrival_ns", "input_tokens"))
    rows = zip(*columns, prefix_nodes(requests), strict=True)
    for request, (time_ns, prompt, chain) in enumerate(rows):
        tokens = [min(block_tokens, prompt - place * block_tokens) for place in range(len(chain))]
        entries = list(zip(chain, tokens, strict=True))
        for block, length in entries:
            events.add(time_ns, HBM, "lookup", tokens=length, block=block, request=request)
        for kind in ("hit", "store"):  # a node names its whole prefix: what is stored is a beginning
            for block, length in entries:
                if (block in stored) == (kind == "hit"):
                    events.add(time_ns, HBM, kind, tokens=length, block=block, request=request)
        stored.update(chain)


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
    live: dict[int, dict[int, int | None]] = {}  # by level, each block's tokens
    for row in read_batches(path):
        time_ns = round(row.seconds("ts") * NS_PER_S)
        for event in row.get("events"):
            level = _MEDIA.get(str(event.get("medium") or "GPU").upper(), STORAGE)
            held = live.setdefault(level, {})
            kind = event.get("type")
            if kind == "AllBlocksCleared":
                for block, tokens in sorted(held.items()):
                    events.add(time_ns, level, "evict", block=block, tokens=tokens)
                held.clear()
                continue
            hashes = event.get("block_hashes")
            if kind not in ("BlockStored", "BlockRemoved") or not isinstance(hashes, list):
                row.fail("events", f"{kind!r} with block_hashes {hashes!r}: BlockStored or BlockRemoved expected")
            size = event.get("block_size")
            for block in map(_hash, hashes):
                if kind == "BlockStored":
                    held[block] = size if type(size) is int and size > 0 else None
                    events.add(time_ns, level, "store", block=block, tokens=held[block])
                else:
                    events.add(time_ns, level, "evict", block=block, tokens=held.pop(block, None))


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
    lines: list[tuple[int, list[Any]]] = []
    prompts: dict[int, int] = {}
    row = 0
    try:
        for row, text in read_lines(path):
            line = json.loads(text)
            if isinstance(line, list) and line[0] == "R":
                prompts[line[1]] = line[4]
            elif isinstance(line, list):
                lines.append((row, line))
        requests = _Requests(prompts)
        for row, line in lines:  # noqa: B007 - the error names it
            _add_hicache_step(line, requests, events)
    except (ValueError, IndexError, TypeError, RecursionError) as error:
        raise InputError(f"not a line of a HiCache decision log ({error})", path=path, row=row) from error


class _Requests:
    """Which requests have been admitted, and what prefetches have brought those that still wait.

    Args:
        prompts: prompt tokens by request, as far as the log names them.
    """

    def __init__(self, prompts: Mapping[int, int]) -> None:
        self._prompts = prompts
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
            prompt = self._prompts.get(request, cached + new)  # a first chunk is not the whole prompt
            events.add(time_ns, HBM, "lookup", tokens=prompt, request=request)
            from_storage = min(loaded, self._fetched.get(request, 0))
            for level, tokens in (HBM, cached - loaded), (HOST, loaded - from_storage), (STORAGE, from_storage):
                if tokens:
                    events.add(time_ns, level, "hit", tokens=tokens, request=request)


def _add_hicache_step(line: list[Any], requests: _Requests, events: _Events) -> None:
    time_ns = line[4]
    if line[3] != "D":
        requests.add_hits(line, events)
    for *_, length, _ in line[16]:
        events.add(time_ns, HBM, "evict", tokens=length)
    for event in line[19]:
        if event[0] in _HICACHE and (event[0] != "p" or event[4]):
            level, kind, place = _HICACHE[event[0]]
            if event[place]:
                events.add(time_ns, level, kind, tokens=event[place])
    for _, _, freed in line[20]:
        if freed:
            events.add(time_ns, HOST, "evict", tokens=freed)
