"""Which host nodes may be dropped: found by their state (0.5.6), or from the list that 0.5.9 keeps."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Protocol

from kvtwin.sim.sglang.eviction import EvictionPolicy, EvictionQueue
from kvtwin.sim.sglang.radix_tree import TreeNode


class HostLeaves(Protocol):
    """Candidates for host eviction."""

    def update(self, node: TreeNode) -> None:
        """A node's levels, locks or children have changed."""

    def touch(self, node: TreeNode) -> None:
        """A node's key may have fallen."""

    def drain(self) -> Iterator[TreeNode]:
        """Candidates in the policy's order."""

    def join(self, parent: TreeNode) -> None:
        """The last child of a host node has been dropped."""

    def released(self, node: TreeNode) -> None:
        """No transfer holds a node on the host any more."""

    def drop(self, node: TreeNode) -> None:
        """A node has left the tree."""


class QueuedHostLeaves:
    """Host nodes without children, by their state when their turn comes.

    0.5.6 looks for them at each eviction; 0.5.9 keeps a list, which comes to the same unless evicted nodes are
    written back.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._queue = EvictionQueue(policy, _is_host_leaf)

    def update(self, node: TreeNode) -> None:
        """Offer a node that has become a candidate."""
        if _is_host_leaf(node):
            self._queue.offer(node)

    def touch(self, node: TreeNode) -> None:
        """Rank it anew where its key may fall."""
        self._queue.touch(node)

    def drain(self) -> Iterator[TreeNode]:
        """Candidates in the policy's order."""
        return self._queue.drain()

    def join(self, parent: TreeNode) -> None:
        """A parent follows its last child."""
        self._queue.offer(parent)

    def released(self, node: TreeNode) -> None:
        """It may be dropped now."""
        self.update(node)

    def drop(self, node: TreeNode) -> None:
        """It is off the queue already."""


class ListedHostLeaves:
    """`evictable_host_leaves` of 0.5.9, as it is kept there.

    Under write_back a parent that has a host copy leaves the device before a child that is still being written; it is
    listed then, and nothing takes it off the list when the child follows. Dropped before that child, it comes up once
    more when the child has been dropped, and SGLang stops.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._key = policy.key
        self._listed: dict[TreeNode, None] = {}
        self._heap: list[tuple[Any, int, TreeNode]] = []
        self._serial = 0

    def update(self, node: TreeNode) -> None:
        """List a node or take it off (`_update_host_leaf_status`)."""
        if node.on_device or node.lock_ref > 0 or any(not child.on_device for child in node.children.values()):
            self._listed.pop(node, None)
        else:
            self._listed[node] = None

    def touch(self, node: TreeNode) -> None:
        """All are ranked at each eviction."""

    def drain(self) -> Iterator[TreeNode]:
        """What is listed now, in the policy's order, and whoever joins meanwhile."""
        self._heap = []
        for node in self._listed:
            self.join(node)
        while self._heap:
            node = heapq.heappop(self._heap)[2]
            yield node

    def join(self, parent: TreeNode) -> None:
        """A parent follows its last child, listed or not."""
        self._serial += 1
        heapq.heappush(self._heap, (self._key(parent), self._serial, parent))

    def released(self, node: TreeNode) -> None:
        """It has stayed on the list."""

    def drop(self, node: TreeNode) -> None:
        """A node has left the tree."""
        self._listed.pop(node, None)


def _is_host_leaf(node: TreeNode) -> bool:
    return not node.on_device and not node.children and node.lock_ref == node.host_ref == 0 and node.alive
