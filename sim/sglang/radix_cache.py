"""The prefix cache of one device (`RadixCache`): the radix tree, as requests see it."""

from __future__ import annotations

from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.runs import Runs, merge_runs


class RadixCache:
    """Shares prefixes between requests; see `KvCache` for the calls.

    Args:
        tree: the cached prefixes.
        pool: the device's KV slots.
        caches_outputs: a finished request leaves its outputs as well (0.5.9), else only what was prefilled.
    """

    disable = False

    def __init__(self, tree: RadixTree, pool: KvPool, *, caches_outputs: bool) -> None:
        self._tree, self._pool, self._caches_outputs = tree, pool, caches_outputs
        self._prompts: dict[int, tuple[tuple[tuple[int, int], ...], Runs]] = {}

    @property
    def observer(self) -> CacheObserver:
        """Who hears of the cache's decisions."""
        return self._tree.observer

    @observer.setter
    def observer(self, observer: CacheObserver) -> None:
        self._tree.observer = observer

    @property
    def root_node(self) -> TreeNode:
        """The top of the tree."""
        return self._tree.root_node

    def evictable_size(self) -> int:
        """Tokens that an eviction could free."""
        return self._tree.evictable

    def protected_size(self) -> int:
        """Tokens that are locked."""
        return self._tree.protected

    @property
    def num_evicted(self) -> int:
        """Tokens evicted from the device so far."""
        return self._tree.num_evicted

    def match(self, request: SglangRequest, num_tokens: int) -> None:
        """Look up its first `num_tokens` tokens; sets prefix_len and last_node."""
        request.prefix_len, node = self._tree.match_prefix(self.key(request), num_tokens)
        request.last_node = request.last_host_node = node
        request.host_hit_len = 0

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Keep the path to a node from being evicted."""
        self._tree.inc_lock_ref(node)

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Take one lock from the path to a node."""
        self._tree.dec_lock_ref(node)

    def evict(self, num_tokens: int) -> None:
        """Free at least `num_tokens`, if that many are evictable."""
        self._pool.free(self._tree.evict(num_tokens))

    def cache_unfinished_req(self, request: SglangRequest, *, chunked: bool = False) -> None:
        """Insert what has been prefilled, free what others had inserted meanwhile, and move the lock to its end."""
        key, tree = self.key(request), self._tree
        node = self._insert(request, key, request.fill_len, chunked=chunked)
        # Upstream matches the key anew, and unlocks one path to lock the other: the same, by a longer way.
        if tree.keeps_locked_paths:
            tree.touch_path(node)
            tree.move_lock_ref(request.last_node, node)
        else:
            _, node = tree.match_prefix(key, request.fill_len)
            tree.dec_lock_ref(request.last_node)
            tree.inc_lock_ref(node)
        request.last_node = node
        request.cache_protected_len = node.end
        request.prefix_len = request.fill_len

    def cache_finished_req(self, request: SglangRequest, *, is_insert: bool = True) -> None:
        """Leave its KV to the tree, or not; free the rest and unlock."""
        num_tokens = min(request.kv_len, request.num_tokens) if self._caches_outputs else request.fill_len
        kept = request.cache_protected_len
        if is_insert:
            self._insert(request, self.key(request), num_tokens, chunked=False)
            kept = num_tokens - num_tokens % self._pool.page_size
        self._pool.free(self._pool.ceil(request.kv_len) - kept)
        self._tree.dec_lock_ref(request.last_node)
        self._prompts.pop(request.row, None)

    def _insert(self, request: SglangRequest, key: Runs, num_tokens: int, *, chunked: bool) -> TreeNode:
        tree = self._tree
        above = request.last_node if tree.keeps_locked_paths else tree.root_node
        duplicate, node = tree.extend(above, key, num_tokens, request.priority, chunked=chunked)
        self._pool.free(max(0, duplicate - request.cache_protected_len))
        return node

    def key(self, request: SglangRequest) -> Runs:
        """Its prompt and all outputs it may ever have, as a key: lengths say how much of it is meant."""
        known = self._prompts.get(request.row)
        if known is None or known[0] is not request.prompt_runs:
            known = request.prompt_runs, merge_runs([*request.prompt_runs, *request.output_runs])
            self._prompts[request.row] = known
        return known[1]
