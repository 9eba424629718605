"""Who leaves a radix cache first (`mem_cache/evict_policy.py`), and the queue that finds it without a search."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from kvtwin.traces.errors import InputError

if TYPE_CHECKING:
    from kvtwin.sim.sglang.radix_tree import TreeNode

EvictionKey = Callable[["TreeNode"], Any]
# From this many hits on, slru protects a node (`SLRUStrategy.protected_threshold`).
_SLRU_HITS: Final = 2


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """An order over evictable nodes.

    Attributes:
        key: what a node is ranked by; the smallest goes first.
        moves: how a node's key changes while it stays: "up" or "down" allow a queue that is kept between evictions,
            "freely" (a user's function) has every leaf ranked anew at each eviction, as upstream does.
    """

    key: EvictionKey
    moves: str = "freely"


EVICTION_POLICIES: Final[Mapping[str, EvictionPolicy]] = MappingProxyType(
    {
        "lru": EvictionPolicy(lambda node: node.last_access, "up"),
        "lfu": EvictionPolicy(lambda node: (node.hit_count, node.last_access), "up"),
        "fifo": EvictionPolicy(lambda node: node.creation, "up"),
        "mru": EvictionPolicy(lambda node: -node.last_access, "down"),
        "filo": EvictionPolicy(lambda node: -node.creation, "up"),
        "priority": EvictionPolicy(lambda node: (node.priority, node.last_access), "up"),
        "slru": EvictionPolicy(lambda node: (node.hit_count >= _SLRU_HITS, node.last_access), "up"),
    }
)


def eviction_policy(policy: str | EvictionKey) -> EvictionPolicy:
    """A policy by its SGLang name, or a user's ranking function (smallest first).

    Raises:
        InputError: an unknown name.
    """
    if callable(policy):
        return EvictionPolicy(policy)
    if policy not in EVICTION_POLICIES:
        known = ", ".join(EVICTION_POLICIES)
        raise InputError(f"eviction policy is {policy!r}: one of {known} expected")
    return EVICTION_POLICIES[policy]


class EvictionQueue:
    """Candidates for eviction, smallest key first.

    Upstream ranks every leaf at each eviction. Here a candidate is offered when it becomes one; whether it still is,
    and whether its key has moved since, is looked at when its turn comes, so that an eviction costs what it evicts.

    Args:
        policy: the order.
        is_candidate: whether a node may go now.
    """

    def __init__(self, policy: EvictionPolicy, is_candidate: Callable[[TreeNode], bool]) -> None:
        self._key, self._moves, self._is_candidate = policy.key, policy.moves, is_candidate
        self._heap: list[tuple[Any, int, TreeNode]] = []
        self._offered: dict[TreeNode, None] = {}
        self._serial = 0
        self._draining = False

    def offer(self, node: TreeNode) -> None:
        """A node has become a candidate, or has been touched while it is one."""
        if self._moves == "freely":
            if self._draining:
                self._push(node)
        elif self._moves == "down":
            self._push(node)
            if len(self._heap) > 64 + 4 * len(self._offered):
                self._compact()
        elif node not in self._offered:
            self._push(node)
        self._offered[node] = None

    def touch(self, node: TreeNode) -> None:
        """A node's key may have fallen."""
        if self._moves == "down" and self._is_candidate(node):
            self.offer(node)

    def _push(self, node: TreeNode) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self._key(node), self._serial, node))

    def _compact(self) -> None:
        # In place: an eviction may be going through it.
        self._heap[:] = [(key, serial, node) for key, serial, node in self._heap if self._holds(node, key)]
        heapq.heapify(self._heap)
        self._offered = {node: None for _, _, node in self._heap}

    def _holds(self, node: TreeNode, key: Any) -> bool:
        return self._is_candidate(node) and bool(key == self._key(node))

    def drain(self) -> Iterator[TreeNode]:
        """Candidates in order, each taken out; nodes offered meanwhile join in. Stop when enough has been freed."""
        if self._moves == "freely":
            yield from self._drain_ranked()
            return
        heap = self._heap
        while heap:
            key, serial, node = heapq.heappop(heap)
            if not self._is_candidate(node):
                self._offered.pop(node, None)
                continue
            current = self._key(node)
            if key != current and self._moves == "up":
                heapq.heappush(heap, (current, serial, node))
            elif key == current and node in self._offered:
                del self._offered[node]
                yield node

    def _drain_ranked(self) -> Iterator[TreeNode]:
        """Rank every candidate now: its key may be anything."""
        nodes = [node for node in self._offered if self._is_candidate(node)]
        self._offered = dict.fromkeys(nodes)
        self._heap = [(self._key(node), serial, node) for serial, node in enumerate(nodes, self._serial)]
        self._serial += len(nodes)
        heapq.heapify(self._heap)
        self._draining = True
        try:
            while self._heap:
                node = heapq.heappop(self._heap)[2]
                del self._offered[node]
                yield node
        finally:
            self._draining = False
            self._heap = []
