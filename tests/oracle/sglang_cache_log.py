"""The decisions of a cache in the words of SGLang's oracle logs (oracle/sglang/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import TreeNode


class CacheLog(CacheObserver):
    """Notes what a cache decides as the driver's log has it.

    Args:
        levels: whether evicted nodes are marked with the level that keeps them (`hi_*`).
        now_ns: reads the virtual clock.
    """

    def __init__(self, *, levels: bool = False, now_ns: Callable[[], int] = lambda: 0) -> None:
        self.evictions: list[list[Any]] = []
        self.events: list[list[Any]] = []
        self.host_evictions: list[list[Any]] = []
        self._levels, self._now_ns = levels, now_ns

    def evicted(self, node: TreeNode) -> None:
        """Note an eviction from the device."""
        self.evictions.append([("b" if node.on_host else "r"), *_name(node)] if self._levels else _name(node))

    def evicted_host(self, wanted: int, freed: int) -> None:
        """Note an eviction from the host."""
        self.host_evictions.append(["need", wanted, freed])

    def backed_up(self, node: TreeNode, num_tokens: int) -> None:
        """Note a copy to the host."""
        self._note("w", num_tokens, *_name(node))

    def loaded_back(self, node: TreeNode, num_tokens: int) -> None:
        """Note a load back, and whether host eviction has cut its path off the tree."""
        self._note("l", num_tokens, *_name(node), *([1] if is_cut_off(node) else []))

    def storing(self, node: TreeNode) -> None:
        """Note a backup to storage."""
        self._note("s", node.length, *_name(node))

    def prefetch_asked(self, row: int, num_tokens: int, started: bool) -> None:
        """Note a try to prefetch."""
        self._note("p", row, num_tokens, int(started))

    def prefetch_hit(self, row: int, time_ns: int, num_tokens: int) -> None:
        """Note storage's answer."""
        self.events.append(["h", time_ns, row, num_tokens])

    def prefetch_revoked(self, row: int, time_ns: int, num_tokens: int) -> None:
        """Note storage's answer."""
        self.events.append(["v", time_ns, row, num_tokens])

    def prefetch_read(self, row: int, time_ns: int, num_tokens: int, stopped: bool) -> None:
        """Note the end of the reads."""
        self.events.append(["e", time_ns, row, num_tokens, int(stopped)])

    def prefetch_taken(self, row: int, num_tokens: int, hit_tokens: int) -> None:
        """Note what the scheduler got."""
        self._note("q", row, num_tokens, hit_tokens)

    def _note(self, kind: str, *values: int) -> None:
        self.events.append([kind, self._now_ns(), *values])


def taken(noted: list[Any]) -> list[Any]:
    """What has been noted since the last time."""
    new = list(noted)
    noted.clear()
    return new


def is_cut_off(node: TreeNode) -> bool:
    """Whether a path that ends at a node is not to be found from the root."""
    while (parent := node.parent) is not None:
        if parent.children.get(node.edge) is not node:
            return True
        node = parent
    return False


def _name(node: TreeNode) -> list[int]:
    return [node.end, node.length, node.last_token]
