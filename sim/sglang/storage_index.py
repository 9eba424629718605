"""Which pages HiCache's storage holds, without a limit or with the file backend's LRU eviction."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, common_prefix, edge_at, place_of
from kvtwin.traces.errors import InputError


@dataclass(frozen=True, slots=True)
class StorageLimit:
    """How much storage may hold.

    SGLang's file backend has a limit from 0.5.23 on (`LRUFileEvictor`): a page that would exceed `max_size` drops the
    least recently written or read pages until `eviction_ratio` of it is left, the new page included. Its `max_size` is
    in bytes; here it is `max_tokens`, because bytes per token are not part of a server's settings.

    Attributes:
        max_tokens: most tokens; None for no limit.
        eviction_ratio: share of the limit that an eviction goes down to.
    """

    max_tokens: int | None = None
    eviction_ratio: float = 0.9

    @classmethod
    def of(cls, extra_config: Mapping[str, Any], page_size: int) -> StorageLimit:
        """From `hicache_storage_backend_extra_config`.

        Raises:
            InputError: a value out of range, or a limit in bytes.
        """
        for name in ("max_size", "min_free_space"):
            if extra_config.get(name):
                raise InputError(
                    f"{name} is in bytes: give max_tokens instead, bytes divided by the KV bytes of a token"
                )
        max_tokens, ratio = extra_config.get("max_tokens"), extra_config.get("eviction_ratio", 0.9)
        whole = isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens >= page_size
        if max_tokens is not None and not whole:
            raise InputError(f"max_tokens is {max_tokens!r}: a page ({page_size} tokens) or more expected")
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise InputError(f"eviction_ratio is {ratio!r}: a share above 0 and up to 1 expected")
        return cls(max_tokens, float(ratio))


class StorageIndex(RadixTree):
    """The pages that storage holds, each known by all tokens up to its end, as its hash chain is.

    Nodes with `on_host` are held; their `priority` is the number of their last use. A use goes through its pages in
    order, so pages of a node are as old as the node, the first the oldest, and eviction takes whole nodes but for one.

    Args:
        page_size: tokens per page.
        limit: how much it may hold.
        evicted: hears of tokens that are dropped, and when.
    """

    def __init__(self, page_size: int, limit: StorageLimit, evicted: Callable[[int, int], None]) -> None:
        super().__init__(page_size)
        self._limit, self._evicted = limit, evicted
        self.num_tokens = 0
        self._num_uses = self._num_pushes = 0
        # By last use and place in it: (use, depth at the node's end, serial, node), some of them outdated.
        self._oldest: list[tuple[int, int, int, TreeNode]] = []
        self._tidy_at = 1024

    def reach(self, key: Runs, end: int) -> TreeNode:
        """The node at which a sequence's first `end` tokens end, held or not."""
        node = self.root_node
        for node in self._below(self.root_node, key, end):  # noqa: B007 - the last one is wanted
            pass
        return node

    def put(self, above: TreeNode, key: Runs, num_tokens: int, time_ns: int) -> TreeNode:
        """Hold the first `num_tokens` of a key that goes on where the path to a node ends; returns where it ends."""
        self._num_uses += 1
        node = above
        for node in self._below(above, key, num_tokens):
            if not node.on_host:
                self._admit(node, time_ns)
            self._use(node)
        return node

    def _below(self, node: TreeNode, key: Runs, num_tokens: int) -> Iterator[TreeNode]:
        """Nodes along a key that begins below a node, made or split as need be."""
        depth = index = offset = 0
        while depth < num_tokens:
            child = node.children.get(edge_at(key, index, offset, self.page_size))
            if child is None:
                child = self._add_leaf(node, key, depth, num_tokens, 0)
            else:
                common, index, offset = common_prefix(child.runs, key, index, offset)
                common = min(common, num_tokens - depth)
                if common < child.length:
                    common -= common % self.page_size
                    child = self._split(child, common)
                    index, offset = place_of(key, depth + common)
            depth += child.length
            node = child
            yield node

    def count(self, key: Runs, start: int, end: int) -> int:
        """How many tokens from `start` on are held without a gap, up to `end`."""
        reached = start
        for node, depth in self.walk(key, end):
            if depth > start:
                if not node.on_host:
                    break
                reached = depth
        return reached - start

    def read(self, key: Runs, start: int, end: int) -> int:
        """Like `count`; what is found has been used."""
        if self._limit.max_tokens is None:
            return end - start
        self.match_prefix(key, start)
        self.match_prefix(key, end)
        self._num_uses += 1
        reached = start
        for node, depth in self.walk(key, end):
            if depth > start:
                if not node.on_host:
                    break
                self._use(node)
                reached = depth
        return reached - start

    def _admit(self, node: TreeNode, time_ns: int) -> None:
        """Hold a node, in parts where evictions come in between."""
        if self._limit.max_tokens is not None:
            while (room := self._limit.max_tokens - self.num_tokens) < node.length:
                pages = room - room % self.page_size
                if pages > 0:
                    upper = self._split(node, pages)
                    upper.on_host = True
                    self.num_tokens += pages
                    self._use(upper)
                self._make_room(time_ns)
        node.on_host = True
        self.num_tokens += node.length

    def _use(self, node: TreeNode) -> None:
        node.priority = self._num_uses
        self._push(node)

    def _push(self, node: TreeNode) -> None:
        if self._limit.max_tokens is None:
            return
        if len(self._oldest) >= self._tidy_at:
            self._oldest = [entry for entry in self._oldest if _is_current(entry)]
            heapq.heapify(self._oldest)
            self._tidy_at = 2 * len(self._oldest) + 1024
        self._num_pushes += 1
        heapq.heappush(self._oldest, (node.priority, node.end, self._num_pushes, node))

    def _split(self, lower: TreeNode, at: int) -> TreeNode:
        upper = super()._split(lower, at)
        if upper.on_host:
            self._push(upper)
        return upper

    def _make_room(self, time_ns: int) -> None:
        """Drop the oldest pages for one more (`LRUFileEvictor._evict_locked`)."""
        assert self._limit.max_tokens is not None
        target = max(0, int(self._limit.max_tokens * self._limit.eviction_ratio) - self.page_size)
        num_evicted = 0
        while self.num_tokens > target:
            entry = heapq.heappop(self._oldest)
            if not _is_current(entry):
                continue
            node, excess = entry[3], self.num_tokens - target
            excess += -excess % self.page_size
            if excess < node.length:
                self._push(node)
                node = self._split(node, excess)
            node.on_host = False
            self.num_tokens -= node.length
            num_evicted += node.length
        self._evicted(time_ns, num_evicted)


def _is_current(entry: tuple[int, int, int, TreeNode]) -> bool:
    use, _, _, node = entry
    return node.on_host and node.priority == use
