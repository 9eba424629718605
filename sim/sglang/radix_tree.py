"""The radix tree of cached prefixes (`mem_cache/radix_cache.py`), by nodes rather than tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kvtwin.sim.sglang.eviction import EvictionKey, EvictionQueue, eviction_policy
from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.runs import Edge, Runs, common_prefix, cut, edge_at, last_token, merge_runs, place_of


class TreeNode:
    """A stretch of tokens that is kept or dropped as one.

    Attributes:
        children: nodes below, by their first page, in the order they came.
        parent: the node above; None for the root only.
        runs, length: its tokens, a whole number of pages.
        end: tokens from the root to its end.
        edge: its first page, the key under which `parent` holds it.
        lock_ref: how many hold it on the device.
        last_access, creation: readings of the tree's counter, which orders events as SGLang's clock does.
        hit_count, priority: for the eviction policies of those names.
        on_device, on_host: which levels hold its KV.
        host_ref: how many transfers hold it on the host.
        alive: whether it is part of the tree.
        stored: where storage's index ends alike, once its KV has been written there.
    """

    __slots__ = (
        "alive", "children", "creation", "edge", "end", "hit_count", "host_ref", "last_access", "length",
        "lock_ref", "on_device", "on_host", "parent", "priority", "runs", "stored",
    )  # fmt: skip

    def __init__(self, parent: TreeNode | None, runs: Runs, length: int, time: int, priority: int) -> None:
        self.children: dict[Edge, TreeNode] = {}
        self.parent = parent
        self.runs, self.length = runs, length
        self.end: int = length if parent is None else parent.end + length
        self.edge: Edge = 0
        self.lock_ref: int = 0
        self.hit_count: int = 0
        self.host_ref: int = 0
        self.last_access: int = time
        self.creation: int = time
        self.priority: int = priority
        self.on_device, self.on_host = True, False
        self.alive = True
        self.stored: TreeNode | None = None

    def key(self) -> Runs:
        """All tokens from the root to its end."""
        parts: list[Runs] = []
        node: TreeNode | None = self
        while node is not None:
            parts.append(node.runs)
            node = node.parent
        return merge_runs(run for part in reversed(parts) for run in part)

    @property
    def last_token(self) -> int:
        """The id of its last token."""
        return last_token(self.runs)


class RadixTree:
    """Prefixes of token sequences, shared; decides what is found and what goes, and counts tokens.

    Args:
        page_size: tokens per page; everything is matched and split at whole pages.
        policy: eviction policy by name, or a ranking function of a node (smallest goes first).
        counts_hits: insertions count as hits and splits copy the count (0.5.11 on); else every count stays 0, and lfu
            is lru.

    Attributes:
        evictable, protected: tokens on the device that may be evicted, and that are locked.
        num_evicted: tokens that have been evicted from the device so far.
        keeps_locked_paths: a locked node can be found from the root as long as it is locked.
    """

    keeps_locked_paths = True

    def __init__(self, page_size: int, policy: str | EvictionKey = "lru", *, counts_hits: bool = False) -> None:
        self.page_size = page_size
        self.counts_hits = counts_hits
        self.time = 0
        self.root_node = TreeNode(None, (), 0, 0, -sys.maxsize)  # prefetched nodes take their parent's priority
        self.root_node.lock_ref = 1
        self.root_node.on_host = True
        self.evictable = self.protected = 0
        self.num_evicted = 0
        self.observer = CacheObserver()
        self._policy = eviction_policy(policy)
        self._queue = EvictionQueue(self._policy, self._is_free_leaf)

    def match_prefix(self, key: Runs, num_tokens: int) -> tuple[int, TreeNode]:
        """The longest cached prefix of a key's first `num_tokens`, in whole pages, and the node where it ends.

        Refreshes the access time of the path, and splits the node in which the match ends.
        """
        page_size = self.page_size
        limit = num_tokens - num_tokens % page_size
        node = self.root_node
        if limit == 0:
            return 0, node
        self.time += 1
        time = self.time
        depth = index = offset = 0
        while depth < limit:
            first, length = key[index]
            edge = first + offset if length - offset >= page_size else edge_at(key, index, offset, page_size)
            child = node.children.get(edge)
            if child is None:
                break
            child.last_access = time
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, limit - depth)
            if common < child.length:
                common -= common % page_size
                node = self._split(child, common)
                depth += common
                break
            node = child
            depth += common
        self._queue.touch(node)
        return depth, node

    def walk(self, key: Runs, num_tokens: int) -> Iterator[tuple[TreeNode, int]]:
        """Nodes along a key's first `num_tokens`, each with the depth at which the key leaves it; changes nothing."""
        page_size = self.page_size
        limit = num_tokens - num_tokens % page_size
        node = self.root_node
        depth = index = offset = 0
        while depth < limit:
            child = node.children.get(edge_at(key, index, offset, page_size))
            if child is None:
                return
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, limit - depth)
            depth += common - common % page_size
            yield child, depth
            if common < child.length:
                return
            node = child

    def insert(
        self, key: Runs, num_tokens: int, priority: int = 0, *, inserted_len: int = 0, chunked: bool = False
    ) -> int:
        """Add a key's first `num_tokens`, in whole pages; returns leading tokens that were there (arguments: `extend`)."""
        known, _ = self.extend(self.root_node, key, num_tokens, priority, inserted_len=inserted_len, chunked=chunked)
        return known

    def extend(
        self,
        above: TreeNode,
        key: Runs,
        num_tokens: int,
        priority: int = 0,
        *,
        inserted_len: int = 0,
        chunked: bool = False,
    ) -> tuple[int, TreeNode]:
        """Add a key's first `num_tokens`, in whole pages, where its beginning is known to be in the tree.

        Args:
            above: the node to which the beginning leads; the root if nothing is known.
            key: the tokens.
            num_tokens: how many of them.
            priority: raises the priority of the path to at least this.
            inserted_len: leading tokens that the same request has inserted before, whose nodes count no hit.
            chunked: the request's prefill goes on; no hits are counted.

        Returns:
            Leading tokens that were there already, and the node where the key ends.
        """
        page_size = self.page_size
        limit = num_tokens - num_tokens % page_size
        counts_hits = self.counts_hits and not chunked
        self.time += 1
        time = self.time
        node = above
        while (parent := node.parent) is not None:
            node.last_access = time
            node.priority = max(node.priority, priority)
            if counts_hits and node.end > inserted_len:
                node.hit_count += 1
            node = parent
        node = above
        depth = above.end
        index, offset = place_of(key, depth)
        while depth < limit:
            first, length = key[index]
            edge = first + offset if length - offset >= page_size else edge_at(key, index, offset, page_size)
            child = node.children.get(edge)
            if child is None:
                break
            child.last_access = time
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, limit - depth)
            partial = common < child.length
            if partial:
                common -= common % page_size
                child = self._split(child, common)
            node = child
            depth += common
            node.priority = max(node.priority, priority)
            if counts_hits and depth > inserted_len:
                node.hit_count += 1
            if partial:
                break
        if depth < limit:
            leaf = self._add_leaf(node, key, depth, limit, priority)
            if counts_hits and limit > inserted_len:
                leaf.hit_count += 1
            node = leaf
            self._queue.offer(leaf)
        else:
            self._queue.touch(node)
        return depth, node

    def touch_path(self, node: TreeNode) -> None:
        """What `match_prefix` does on the way to a node."""
        if node.end == 0:
            return
        self.time += 1
        part = node
        while (parent := part.parent) is not None:
            part.last_access = self.time
            part = parent
        self._queue.touch(node)

    def _add_leaf(self, parent: TreeNode, key: Runs, start: int, end: int, priority: int) -> TreeNode:
        self.time += 2  # last access, then creation
        leaf = TreeNode(parent, cut(key, start, end), end - start, self.time, priority)
        leaf.edge = edge_at(leaf.runs, 0, 0, self.page_size)
        parent.children[leaf.edge] = leaf
        self.evictable += leaf.length
        return leaf

    def _split(self, lower: TreeNode, at: int) -> TreeNode:
        """Cut a node after `at` tokens; returns the new upper part, which is younger than the lower."""
        parent = lower.parent
        assert parent is not None
        self.time += 2
        upper = TreeNode(parent, cut(lower.runs, 0, at), at, self.time, lower.priority)
        upper.lock_ref = lower.lock_ref
        upper.on_device, upper.on_host = lower.on_device, lower.on_host
        if self.counts_hits:
            upper.hit_count = lower.hit_count
        upper.edge = lower.edge
        lower.runs = cut(lower.runs, at, lower.length)
        lower.length -= at
        lower.parent = upper
        lower.edge = edge_at(lower.runs, 0, 0, self.page_size)
        upper.children[lower.edge] = lower
        parent.children[upper.edge] = upper
        self._queue.touch(lower)
        return upper

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Keep a node and all above it from being evicted."""
        while (parent := node.parent) is not None:
            if node.lock_ref == 0:
                self.evictable -= node.length
                self.protected += node.length
            node.lock_ref += 1
            node = parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Take one lock from a node and all above it."""
        start = node
        while (parent := node.parent) is not None:
            if node.lock_ref == 1:
                self.evictable += node.length
                self.protected -= node.length
            node.lock_ref -= 1
            node = parent
        if self._is_free_leaf(start):
            self._queue.offer(start)

    def move_lock_ref(self, above: TreeNode, node: TreeNode) -> None:
        """Move one lock from a node to one below it, or to itself."""
        while node is not above:
            if node.lock_ref == 0:
                self.evictable -= node.length
                self.protected += node.length
            node.lock_ref += 1
            assert node.parent is not None
            node = node.parent

    def evict(self, num_tokens: int) -> int:
        """Drop unlocked leaves, whole, until at least `num_tokens` are free or none is left; returns tokens dropped."""
        num_evicted = 0
        if num_tokens <= 0:
            return 0
        for node in self._queue.drain():
            parent = node.parent
            assert parent is not None
            self.observer.evicted(node)
            num_evicted += node.length
            self.num_evicted += node.length
            self._delete_leaf(node)
            if self._is_free_leaf(parent):
                self._queue.offer(parent)
            if num_evicted >= num_tokens:
                break
        return num_evicted

    def _delete_leaf(self, node: TreeNode) -> None:
        assert node.parent is not None
        del node.parent.children[node.edge]
        node.alive = False
        self.evictable -= node.length

    def _is_free_leaf(self, node: TreeNode) -> bool:
        return node.lock_ref == 0 and not node.children and node.alive
