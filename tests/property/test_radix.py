"""The radix tree and the levels below it against naive models, over random prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.cache_replay import belady_hits, lru_curve, prompts_of, replay
from kvtwin.sim.links import LinkTimes
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.eviction import EVICTION_POLICIES
from kvtwin.sim.sglang.hi_tree import HiRadixTree, HiRules
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, cut, merge_runs, num_tokens
from kvtwin.sim.sglang.storage import StorageThreads
from kvtwin.sim.sglang.storage_index import StorageLimit
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.workload import prefix_blocks

# Few ids and short runs, so that prompts share beginnings and part in the middle of runs.
RUNS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5).map(merge_runs)
PAGES = st.sampled_from([1, 2, 4])


def tokens(key: Runs) -> list[int]:
    """A key token by token."""
    return [first + place for first, length in key for place in range(length)]


def nodes(tree: RadixTree) -> Iterator[TreeNode]:
    """Every node but the root."""
    stack = list(tree.root_node.children.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


class NaiveTree:
    """Cached prefixes page by page: a set of token tuples."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.held: set[tuple[int, ...]] = set()

    def pages(self, key: Runs, length: int) -> list[tuple[int, ...]]:
        """Every page-aligned prefix."""
        flat = tokens(key)[:length]
        return [tuple(flat[:end]) for end in range(self.page_size, len(flat) + 1, self.page_size)]

    def match(self, key: Runs, length: int) -> int:
        """Tokens of the longest prefix held."""
        found = 0
        for prefix in self.pages(key, length):
            if prefix not in self.held:
                break
            found = len(prefix)
        return found


@given(RUNS, st.integers(0, 40), st.integers(0, 40))
def test_a_cut_key_is_the_key_of_the_cut_tokens(key: Runs, start: int, length: int) -> None:
    assert tokens(cut(key, start, start + length)) == tokens(key)[start : start + length]


@settings(max_examples=300, deadline=None)
@given(PAGES, st.sampled_from(sorted(EVICTION_POLICIES)), st.lists(st.tuples(RUNS, st.integers(0, 30)), max_size=25))
def test_the_tree_finds_what_a_set_of_prefixes_holds(page_size: int, policy: str, work: list[tuple[Runs, int]]) -> None:
    tree, naive = RadixTree(page_size, policy, counts_hits=True), NaiveTree(page_size)
    locked: list[TreeNode] = []
    for key, number in work:
        length = min(number, num_tokens(key))
        matched, node = tree.match_prefix(key, length)
        assert matched == naive.match(key, length) == node.end
        if number % 3 == 0:
            tree.inc_lock_ref(node)
            locked.append(node)
        known = tree.insert(key, length, priority=number % 4)
        assert known == matched
        naive.held.update(naive.pages(key, length))
        if number % 4 == 1:
            before = {node: node.key() for node in nodes(tree)}
            freed = tree.evict(number)
            gone = [node for node in before if not node.alive]
            assert freed == sum(node.length for node in gone)
            assert all(node.lock_ref == 0 for node in gone)
            for node in gone:
                flat = tokens(before[node])
                naive.held -= {tuple(flat[:end]) for end in range(node.end, node.end - node.length, -page_size)}
        if locked and number % 5 == 0:
            tree.dec_lock_ref(locked.pop())
        held = list(nodes(tree))
        assert sum(node.length for node in held) == len(naive.held) * page_size
        assert tree.evictable == sum(node.length for node in held if node.lock_ref == 0)
        assert tree.protected == sum(node.length for node in held if node.lock_ref > 0)


@settings(max_examples=150, deadline=None)
@given(PAGES, st.sampled_from(["lru", "lfu", "fifo", "mru", "filo", "priority", "slru"]), st.lists(RUNS, max_size=40))
def test_the_kept_queue_evicts_as_a_fresh_ranking_does(page_size: int, policy: str, keys: list[Runs]) -> None:
    ranked = EVICTION_POLICIES[policy].key
    kept, fresh = (replay(keys, 4 * page_size + 8, order, page_size) for order in (policy, ranked))
    assert (kept.hit_tokens, kept.num_evictions, kept.evicted_tokens) == (
        fresh.hit_tokens,
        fresh.num_evictions,
        fresh.evicted_tokens,
    )


CHAINS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=25)


def workload_from(chains: list[list[int]], last_tokens: int) -> Run:
    """Blocks of 12 tokens; the last one of each prompt is shorter, and its own if it is not whole."""
    names = [[*chain[:-1], chain[-1] + 4 * (12 - last_tokens)] for chain in chains]
    columns = {
        "request_id": [str(row) for row in range(len(chains))],
        "arrival_ns": list(range(len(chains))),
        "input_tokens": [12 * (len(chain) - 1) + last_tokens for chain in chains],
        "output_tokens": [1] * len(chains),
        "block_hashes": names,
    }
    return Run(RunInfo("workload", hash_block_tokens=12), {"requests": from_columns("requests", columns, "chains")})


@settings(max_examples=300, deadline=None)
@given(CHAINS.filter(bool), st.integers(1, 12), st.sampled_from([1, 3, 4, 5, 12, 18]), st.integers(1, 12))
def test_one_pass_counts_what_an_lru_of_that_size_finds_and_belady_bounds_it(
    chains: list[list[int]], capacity: int, page_size: int, last_tokens: int
) -> None:
    """Pages within blocks, pages that blocks end within, and pages of several blocks."""
    run = workload_from(chains, last_tokens)
    prompts = prompts_of(run, page_size)
    held: list[int] = []
    hits = 0
    for chain in prefix_blocks(run.requests, 12, page_size):
        for page in chain.tolist():
            if page not in held:
                break
            hits += page_size
        for page in reversed(chain.tolist()):
            if page in held:
                held.remove(page)
            held.append(page)
            del held[:-capacity]
    capacities, curve = lru_curve(prompts)
    reached = [int(total) for size, total in zip(capacities, curve, strict=True) if size <= capacity]
    assert (reached[-1] if reached else 0) == hits
    assert hits <= belady_hits(prompts, capacity)
    found = replay(prompts.keys, page_size * capacity, "lru", page_size).hit_tokens
    assert found <= belady_hits(prompts, capacity)
    if capacity * page_size >= prompts.distinct_tokens:
        assert found == hits == belady_hits(prompts, capacity)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.sampled_from(["write_through", "write_through_selective"]),
    st.booleans(),
    st.sampled_from([None, 3, 20]),
    st.lists(st.tuples(RUNS, st.integers(0, 60)), max_size=30),
)
def test_levels_conserve_tokens_and_never_drop_what_is_held(
    page_size: int, write_policy: str, listed: bool, storage_pages: int | None, work: list[tuple[Runs, int]]
) -> None:
    clock, times = Clock(), LinkTimes(10, 1, 10, 1, 5, 1, 5, 1, 5, 1)
    device, host = KvPool(32 * page_size, page_size), KvPool(48 * page_size, page_size)
    tree = HiRadixTree("lru", device, host, clock, times, HiRules(write_policy, listed, listed))
    most = None if storage_pages is None else storage_pages * page_size
    tree.storage = StorageThreads(clock, times, page_size, page_size, StorageLimit(most), lambda: tree.observer)
    stored = tree.storage.index
    for key, number in work:
        then = clock.now_ns
        clock.advance(then + number)
        assert clock.now_ns >= then
        tree.storage.advance(clock.now_ns)
        tree.check_writes()
        tree.check_loads()
        for node in tree.storage.messages.backed_up:
            tree.release_host(node)
        tree.storage.messages.backed_up.clear()
        matched, node, host_hit, host_node = tree.match_path(key, num_tokens(key))
        assert matched == node.end and matched + host_hit >= host_node.end
        if host_hit and number % 2:
            node = tree.load_back(host_node)
            matched = node.end
            tree.start_loading()
        need = num_tokens(key) // page_size * page_size - matched
        tree.inc_lock_ref(node)
        if device.available < need:
            tree.evict(need)
        if device.alloc(need):
            device.free(tree.insert(key, num_tokens(key)) - matched)
        assert node.on_device
        tree.dec_lock_ref(node)
        present = list(nodes(tree))
        assert device.size - device.available == sum(part.length for part in present if part.on_device)
        assert host.size - host.available == sum(part.length for part in present if part.on_host)
        assert all(part.on_device or part.on_host for part in present)
        assert all(part.on_device for part in present if part.lock_ref > 0)
        assert tree.evictable + tree.protected == device.size - device.available
        assert stored.num_tokens == sum(part.length for part in nodes(stored) if part.on_host)
        assert most is None or stored.num_tokens <= most


def test_a_cache_smaller_than_a_page_is_refused() -> None:
    from kvtwin.traces.errors import InputError

    with pytest.raises(InputError, match="holds no page"):
        replay([((0, 4),)], 2, "lru", 4)
