"""SGLang's radix cache against logs of the real one: cases `radix_*` and `tree_*` (see oracle/sglang/README.md).

The oracle drives the cache with a trace: at most `window` requests live at once, each matched, made room for and
inserted. `radix_*` uses requests and allocators, `tree_*` the tree alone.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_cache_log import CacheLog, taken  # type: ignore[import-not-found]  # beside this file

from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_cache import RadixCache
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.traces.readers.sglang_workloads import CaseRequest, make_workload

_RADIX_FIELDS = (
    "i", "input_length", "matched", "prefix after insert", "evicted tokens", "evicted nodes", "evictable", "protected",
    "available", "finished before",
)  # fmt: skip
_TREE_FIELDS = (
    "i", "input_length", "matched", "there at insert", "evict request", "evicted nodes", "evictable", "protected",
    "free", "left",
)  # fmt: skip


def counts_hits(version: str) -> bool:
    """Whether the plain cache of a version counts hits (0.5.11 on)."""
    return tuple(int(part) for part in version.split(".")[:3]) >= (0, 5, 11)


class TreeDriver:
    """Drives the tree as `drive_tree.py` does."""

    def __init__(self, settings: Mapping[str, Any], version: str) -> None:
        self.tree = RadixTree(settings["page_size"], settings["policy"], counts_hits=counts_hits(version))
        self.log = self.tree.observer = CacheLog()
        self._free, self._window = settings["pool_tokens"], settings["window"]
        self._by_priority = settings["policy"] == "priority"
        self._alive: deque[tuple[int, TreeNode]] = deque()

    def _leave(self) -> int:
        row, node = self._alive.popleft()
        self.tree.dec_lock_ref(node)
        return row

    def step(self, row: int, request: CaseRequest) -> list[Any]:
        """The line of one request."""
        tree, key, length = self.tree, request.runs, request.input_length
        left = []
        while len(self._alive) >= self._window:
            left.append(self._leave())
        matched, node = tree.match_prefix(key, length - 1)
        tree.inc_lock_ref(node)
        page = tree.page_size
        need = -(-(length - matched) // page) * page + page
        while self._free + tree.evictable < need and self._alive:
            left.append(self._leave())
        if self._free + tree.evictable < need:
            tree.dec_lock_ref(node)
            return [row, length, -1, -1, 0, [], tree.evictable, tree.protected, self._free, left]
        asked = need if self._free < need else 0
        self._free += tree.evict(asked)
        known = tree.insert(key, length, (row * 7919) % 3 if self._by_priority else 0)
        self._free -= length // page * page - known
        _, end = tree.match_prefix(key, length // page * page)
        tree.inc_lock_ref(end)
        tree.dec_lock_ref(node)
        self._alive.append((row, end))
        evicted = taken(self.log.evictions)
        return [row, length, matched, known, asked, evicted, tree.evictable, tree.protected, self._free, left]


class RequestDriver:
    """Drives the cache with requests as `drive_radix.py` does."""

    def __init__(self, settings: Mapping[str, Any], version: str) -> None:
        page_size = settings["page_size"]
        self.pool = KvPool(settings["pool_tokens"], page_size)
        tree = RadixTree(page_size, settings["policy"], counts_hits=counts_hits(version))
        self.cache = RadixCache(tree, self.pool, caches_outputs=not version.startswith("0.5.6"))
        self.log = self.cache.observer = CacheLog()
        self._window = settings.get("window", 1)
        self._by_priority = settings["policy"] == "priority"
        self._alive: deque[SglangRequest] = deque()

    def _finish(self) -> int:
        request = self._alive.popleft()
        self.cache.cache_finished_req(request)
        return request.row

    def step(self, row: int, given: CaseRequest) -> list[Any]:
        """The line of one request."""
        cache, pool, length = self.cache, self.pool, given.input_length
        if length + 2 * pool.page_size * (self._window + 2) > pool.size:
            return [row, length, -1, -1, 0, [], cache.evictable_size(), cache.protected_size(), pool.available, []]
        priority = (row * 7919) % 3 if self._by_priority else 0
        request = SglangRequest(row, 0, length, 4, given.runs, ((-(row + 1) * 8, 5),), priority)
        finished = []
        while len(self._alive) >= self._window:
            finished.append(self._finish())
        cache.match(request, length - 1)
        matched = request.cache_protected_len = request.prefix_len
        cache.inc_lock_ref(request.last_node)
        page = pool.page_size
        while pool.available + cache.evictable_size() < length - matched + 2 * page and self._alive:
            finished.append(self._finish())
        need = length - matched if page == 1 else length - matched + page
        if pool.available < need:
            cache.evict(need)
        pool.alloc(pool.ceil(length) - matched)
        request.fill_len = request.kv_len = length
        cache.cache_unfinished_req(request)
        self._alive.append(request)
        evicted = taken(self.log.evictions)
        sizes = [cache.evictable_size(), cache.protected_size(), pool.available]
        num_evicted = sum(node[1] for node in evicted)
        return [row, length, matched, request.cache_protected_len, num_evicted, evicted, *sizes, finished]


def difference_of(path: Path) -> tuple[int, str]:
    """Requests recorded in a case, and the first difference of ours ("" if there is none)."""
    with gzip.open(path.with_suffix(".jsonl.gz"), "rt") as log:
        lines = [json.loads(line) for line in log]
    settings = json.loads(path.read_text())
    version = lines[0]["sglang"]
    is_tree = lines[0]["fields"][3] == "already_there_at_insert"
    driver = TreeDriver(settings, version) if is_tree else RequestDriver(settings, version)
    names = _TREE_FIELDS if is_tree else _RADIX_FIELDS
    recorded = [line for line in lines if isinstance(line, list)]
    requests = make_workload(settings["workload"])
    if len(recorded) != len(requests):
        return len(recorded), f"{len(recorded)} requests recorded, {len(requests)} in the workload"
    for expected, request in zip(recorded, requests, strict=True):
        actual = driver.step(expected[0], request)
        if actual != expected:
            column = next(i for i in range(len(expected)) if expected[i] != actual[i])
            return len(recorded), (
                f"request {expected[0]} differs in {names[column]}\n"
                f"  recorded  {expected[column]}\n  simulated {actual[column]}"
            )
    return len(recorded), ""
