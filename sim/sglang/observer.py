"""What a cache tells whoever writes its events down."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtwin.sim.sglang.radix_tree import TreeNode


class CacheObserver:
    """Hears every decision of a cache, at the moment it is taken; this one keeps nothing. All lengths are tokens."""

    def evicted(self, node: TreeNode) -> None:
        """A node's device KV is about to be freed; with `node.on_host` the node stays as a host node."""

    def evicted_host(self, wanted: int, freed: int) -> None:
        """Host KV of `freed` tokens has been dropped to make room for `wanted`."""

    def dropped_from_host(self, node: TreeNode) -> None:
        """A host node is about to be dropped."""

    def backed_up(self, node: TreeNode, num_tokens: int) -> None:
        """A copy of a node to the host has been queued; 0 tokens: there is no room."""

    def loaded_back(self, node: TreeNode, num_tokens: int) -> None:
        """The path to a host node is to be loaded to the device; 0 tokens: refused."""

    def dropped_from_storage(self, time_ns: int, num_tokens: int) -> None:
        """Storage has dropped its oldest pages to make room."""

    def storing(self, node: TreeNode) -> None:
        """A backup of a node to storage has been queued."""

    def prefetch_asked(self, row: int, num_tokens: int, started: bool) -> None:
        """A prefetch of a request's next tokens was tried."""

    def prefetch_hit(self, row: int, time_ns: int, num_tokens: int) -> None:
        """Storage holds so many of them, and reading begins."""

    def prefetch_revoked(self, row: int, time_ns: int, num_tokens: int) -> None:
        """Storage holds too few of them."""

    def prefetch_read(self, row: int, time_ns: int, num_tokens: int, stopped: bool) -> None:
        """The reads have ended, with so many complete."""

    def prefetch_taken(self, row: int, num_tokens: int, hit_tokens: int) -> None:
        """The scheduler ends a prefetch, with so many of the hits complete."""
