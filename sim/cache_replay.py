"""A prefix cache by itself: a workload's prompts through it, without an engine, for policy and capacity studies.

Three ways to look at one workload:

* `replay`: SGLang's radix tree of one capacity under any eviction policy, request after request.
* `lru_curve`: an LRU block cache of every capacity at once, by stack distances (Mattson et al., 1970).
* `belady_hits`: what no block cache of a capacity can exceed (Belady, 1966), whatever it knows of the future.

The last two count whole hash blocks; a prompt's last and shorter block takes the place of a whole one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtwin.sim.sglang.eviction import EvictionKey
from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, merge_runs, num_tokens
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.workload import prefix_nodes

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompts:
    """What a cache sees of a workload.

    Attributes:
        keys: each prompt as runs of token ids.
        blocks: each prompt as the names of its hash blocks.
        last_tokens: tokens in each prompt's last block.
        block_tokens: tokens of every other block.
    """

    keys: list[Runs]
    blocks: list[list[int]]
    last_tokens: list[int]
    block_tokens: int

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(num_tokens(key) for key in self.keys)


def prompts_of(workload: Run) -> Prompts:
    """The prompts of a workload whose requests carry block hashes.

    Raises:
        InputError: it has none.
    """
    block_tokens = workload.info.hash_block_tokens
    if not block_tokens or workload.requests.column("block_hashes").null_count == workload.requests.num_rows:
        raise InputError("no block hashes: the workload does not say which prompts begin alike", path=workload.path)
    blocks = prefix_nodes(workload.requests)
    keys, last_tokens = [], []
    for chain, length in zip(blocks, workload.requests.column("input_tokens").to_pylist(), strict=True):
        last = length - block_tokens * (len(chain) - 1) if chain else 0
        runs = [(block * block_tokens, block_tokens) for block in chain]
        if runs:
            runs[-1] = (runs[-1][0], min(last, block_tokens))
        keys.append(merge_runs(runs))
        last_tokens.append(min(last, block_tokens))
    return Prompts(keys, blocks, last_tokens, block_tokens)


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
    keys: Sequence[Runs], capacity_tokens: int, policy: str | EvictionKey = "lru", page_size: int = 64
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
    """Hits of an LRU block cache at every capacity, in one pass.

    A prompt's blocks are touched from its end to its beginning, so that a block never outlives one before it, and
    what is found is always a prefix.

    Returns:
        Capacities in blocks (ascending, those at which hits rise) and the hit tokens at each.
    """
    num_accesses = sum(len(chain) for chain in prompts.blocks)
    # A Fenwick tree over access times marks the latest access of every block.
    marks = [0] * (num_accesses + 1)
    latest: dict[int, int] = {}
    hits: dict[int, int] = {}
    time = 0
    for chain, last in zip(prompts.blocks, prompts.last_tokens, strict=True):
        distances = []
        # All of a prompt is looked up before any of it is touched.
        num_marked = len(latest)
        for place, block in enumerate(chain):
            seen = latest.get(block)
            if seen is None:
                break
            # Blocks touched since its last touch (those of this prompt before it among them), and itself.
            distances.append(num_marked - _count(marks, seen) + 1)
            hits_tokens = last if place == len(chain) - 1 else prompts.block_tokens
            hits[distances[-1]] = hits.get(distances[-1], 0) + hits_tokens
        for block in reversed(chain):
            seen = latest.get(block)
            if seen is not None:
                _add(marks, seen, -1)
            time += 1
            latest[block] = time
            _add(marks, time, 1)
    capacities = np.array(sorted(hits), dtype=np.int64)
    return capacities, np.cumsum([hits[int(capacity)] for capacity in capacities], dtype=np.int64)


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


def belady_hits(prompts: Prompts, capacity_blocks: int) -> int:
    """Most tokens that a cache of `capacity_blocks` could have found: the block needed last goes first.

    It may refuse blocks, drop a block but keep those after it, and counts every block that it holds: a bound for any
    policy, prefix cache or not.
    """
    accesses = [block for chain in prompts.blocks for block in chain]
    num_accesses = len(accesses)
    next_use = [num_accesses] * num_accesses
    upcoming: dict[int, int] = {}
    for place in range(num_accesses - 1, -1, -1):
        next_use[place] = upcoming.get(accesses[place], num_accesses)
        upcoming[accesses[place]] = place
    held: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hit_tokens = place = 0
    for chain, last in zip(prompts.blocks, prompts.last_tokens, strict=True):
        for rank, block in enumerate(chain):
            use = next_use[place]
            place += 1
            if block in held:
                hit_tokens += last if rank == len(chain) - 1 else prompts.block_tokens
            elif use == num_accesses:
                continue
            held[block] = use
            heapq.heappush(furthest, (-use, block))
            while len(held) > capacity_blocks:
                use, block = heapq.heappop(furthest)
                if held.get(block) == -use:
                    del held[block]
    return hit_tokens
