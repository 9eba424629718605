"""A prefix cache by itself: a workload's prompts through it, without an engine, for policy and capacity studies.

Three ways to look at one workload:

* `replay`: SGLang's radix tree of one capacity under any eviction policy, request after request.
* `lru_curve`: an LRU page cache of every capacity at once, by stack distances (Mattson et al., 1970).
* `belady_hits`: what no page cache of a capacity can exceed (Belady, 1966), whatever it knows of the future.

All three cache whole pages of one size: a prompt's last and shorter page is never found.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.sglang.eviction import EvictionKey
from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, merge_runs, num_tokens
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.workload import prefix_blocks, prefix_nodes

IntArray = npt.NDArray[np.int64]

_PAGE_SIZE: Final = 64


@dataclass(frozen=True)
class Prompts:
    """What a cache sees of a workload.

    Attributes:
        keys: each prompt as runs of token ids.
        pages: each prompt as names of blocks, equal where the prompts are up to there, and how many pages each holds.
        page_size: tokens per page.
    """

    keys: list[Runs]
    pages: list[list[tuple[int, int]]]
    page_size: int

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(num_tokens(key) for key in self.keys)

    @property
    def distinct_tokens(self) -> int:
        """Tokens of all different pages: a cache of that size drops nothing."""
        return self.page_size * sum({block: pages for chain in self.pages for block, pages in chain}.values())


def prompts_of(workload: Run, page_size: int | None = None) -> Prompts:
    """The prompts of a workload whose requests carry block hashes.

    Args:
        workload: run with hash_block_tokens.
        page_size: tokens per page of the cache; None for 64, or a hash block where that is smaller.

    Raises:
        InputError: it has none, or a page size below 1.
    """
    block_tokens = workload.info.hash_block_tokens
    if not block_tokens or workload.requests.column("block_hashes").null_count == workload.requests.num_rows:
        raise InputError("no block hashes: the workload does not say which prompts begin alike", path=workload.path)
    page_size = min(_PAGE_SIZE, block_tokens) if page_size is None else page_size
    if page_size < 1:
        raise InputError(f"--page-size {page_size}: a token at least")
    keys, pages = [], []
    lengths = workload.requests.column("input_tokens").to_pylist()
    for chain, length in zip(prefix_nodes(workload.requests), lengths, strict=True):
        left = [min(block_tokens, length - place * block_tokens) for place in range(len(chain))]
        keys.append(merge_runs((block * block_tokens, tokens) for block, tokens in zip(chain, left, strict=True)))
        whole = [(block, tokens // page_size) for block, tokens in zip(chain, left, strict=True) if tokens >= page_size]
        pages.append(whole)
    if block_tokens % page_size:
        chains = prefix_blocks(workload.requests, block_tokens, page_size)
        pages = [[(page, 1) for page in chain.tolist()] for chain in chains]
    return Prompts(keys, pages, page_size)


@dataclass(slots=True)
class ReplayResult:
    """What a cache did with a workload, in tokens.

    Attributes:
        policy, capacity_tokens, page_size: the cache.
        input_tokens: of all prompts.
        hit_tokens: found in the cache.
        evicted_tokens, num_evictions: dropped, and in how many pieces.
        uncached: prompts longer than the cache, which pass it by.
    """

    policy: str
    capacity_tokens: int
    page_size: int
    input_tokens: int = 0
    hit_tokens: int = 0
    evicted_tokens: int = 0
    num_evictions: int = 0
    uncached: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that was found."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


class _Evictions(CacheObserver):
    def __init__(self, result: ReplayResult) -> None:
        self._result = result

    def evicted(self, node: TreeNode) -> None:
        self._result.num_evictions += 1
        self._result.evicted_tokens += node.length


def replay(
    keys: Sequence[Runs], capacity_tokens: int, policy: str | EvictionKey = "lru", page_size: int = _PAGE_SIZE
) -> ReplayResult:
    """Send prompts through a radix tree, one at a time, each kept whole.

    Args:
        keys: the prompts in order of arrival.
        capacity_tokens: what the cache holds.
        policy: eviction policy by SGLang's name, or a ranking function of a node (smallest goes first).
        page_size: tokens per page.

    Raises:
        InputError: an unknown policy, or a cache smaller than a page.
    """
    if page_size < 1 or capacity_tokens < page_size:
        raise InputError(f"a cache of {capacity_tokens} tokens holds no page of {page_size}")
    result = ReplayResult(policy if isinstance(policy, str) else policy.__name__, capacity_tokens, page_size)
    tree = RadixTree(page_size, policy, counts_hits=True)
    tree.observer = _Evictions(result)
    free = capacity_tokens // page_size * page_size
    total = free
    for key in keys:
        length = num_tokens(key)
        matched, node = tree.match_prefix(key, length)
        result.input_tokens += length
        result.hit_tokens += matched
        whole = length - length % page_size
        if whole > total:
            result.uncached += 1
            continue
        missing = whole - matched
        if missing > free:
            tree.inc_lock_ref(node)
            free += tree.evict(missing - free)
            tree.dec_lock_ref(node)
        # A hit is counted, so that lfu and slru see it.
        tree.insert(key, whole)
        free -= missing
    return result


def lru_curve(prompts: Prompts) -> tuple[IntArray, IntArray]:
    """Hits of an LRU page cache at every capacity, in one pass.

    A prompt's pages are touched from its end to its beginning, so that a page never outlives one before it, and what is
    found is always a prefix. Pages of one block are always touched together: each block is one entry of that many pages.

    Returns:
        Capacities in pages (ascending, those at which hits rise) and the hit tokens at each.
    """
    # A Fenwick tree over touches holds, at the latest of each block, its pages.
    marks = [0] * (sum(len(chain) for chain in prompts.pages) + 1)
    latest: dict[int, tuple[int, int]] = {}  # by block: its latest touch, and its pages then
    found: dict[int, int] = {}
    time = num_marked = 0
    for chain in prompts.pages:
        # All of a prompt is looked up before any of it is touched.
        for block, pages in chain:
            touch, held = latest.get(block, (0, 0))
            if not held:
                break
            # Pages touched since this block was (those of this prompt before it among them), then its own.
            newer = num_marked - _count(marks, touch)
            for distance in range(newer + 1, newer + 1 + min(held, pages)):
                found[distance] = found.get(distance, 0) + 1
            if held < pages:
                break
        for block, pages in reversed(chain):
            touch, held = latest.get(block, (0, 0))
            if held:
                _add(marks, touch, -held)
            time += 1
            latest[block] = time, pages
            _add(marks, time, pages)
            num_marked += pages - held
    capacities = np.array(sorted(found), dtype=np.int64)
    hits = prompts.page_size * np.cumsum([found[int(capacity)] for capacity in capacities], dtype=np.int64)
    return capacities, hits


def _add(marks: list[int], place: int, amount: int) -> None:
    while place < len(marks):
        marks[place] += amount
        place += place & -place


def _count(marks: list[int], place: int) -> int:
    total = 0
    while place > 0:
        total += marks[place]
        place &= place - 1
    return total


def belady_hits(prompts: Prompts, num_pages: int) -> int:
    """Most tokens that a cache of `num_pages` could have found: the page needed last goes first.

    It may refuse pages, drop a page but keep those after it, and counts every page that it holds: a bound for any
    policy, prefix cache or not.
    """
    accesses = [block for chain in prompts.pages for block, _ in chain]
    never = len(accesses)
    next_use = [never] * never
    upcoming: dict[int, int] = {}
    for place in range(never - 1, -1, -1):
        next_use[place] = upcoming.get(accesses[place], never)
        upcoming[accesses[place]] = place
    held: dict[int, tuple[int, int]] = {}  # by block: its next use, and how many of its pages are held
    furthest: list[tuple[int, int]] = []
    num_hits = num_held = 0
    for use, (block, pages) in zip(next_use, (entry for chain in prompts.pages for entry in chain), strict=True):
        _, before = held.get(block, (0, 0))
        num_hits += min(before, pages)
        if not before and use == never:
            continue
        held[block] = use, pages
        num_held += pages - before
        heapq.heappush(furthest, (-use, block))
        while num_held > num_pages:
            use, block = heapq.heappop(furthest)
            if held.get(block, (0, 0))[0] != -use:
                continue
            kept = max(0, held[block][1] - (num_held - num_pages))
            num_held -= held.pop(block)[1] - kept
            if kept:
                held[block] = -use, kept
                heapq.heappush(furthest, (use, block))
    return prompts.page_size * num_hits
