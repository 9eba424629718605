"""The radix tree over device and host (`mem_cache/hiradix_cache.py`): who is copied, dropped and loaded back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from kvtwin.sim.links import Link, LinkTimes
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.eviction import EvictionKey
from kvtwin.sim.sglang.host_leaves import HostLeaves, ListedHostLeaves, QueuedHostLeaves
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, common_prefix, edge_at, place_of
from kvtwin.sim.sglang.scheduler import UpstreamStopError
from kvtwin.sim.sglang.storage import StorageThreads

# Fewer tokens are not worth loading back (`load_back_threshold`).
_LOAD_BACK_TOKENS: Final = 10


@dataclass(frozen=True, slots=True)
class HiRules:
    """How the two levels work together.

    Attributes:
        write_policy: when KV is copied to the host, one of config.WRITE_POLICIES.
        lists_host_leaves: keep a list of droppable host nodes (0.5.9).
        stores_written_back: nodes written back go on to storage (0.5.9).
    """

    write_policy: str
    lists_host_leaves: bool
    stores_written_back: bool


class HiRadixTree(RadixTree):
    """A radix tree whose nodes live on the device, on the host, or on both.

    Args:
        policy: eviction policy of both levels, by name or as a ranking function.
        device, host: KV slots of the two levels.
        clock: virtual time.
        times: what copies take.
        rules: how the levels work together.
    """

    def __init__(
        self, policy: str | EvictionKey, device: KvPool, host: KvPool, clock: Clock, times: LinkTimes, rules: HiRules
    ) -> None:
        super().__init__(device.page_size, policy)
        self._device, self.host, self._clock, self._rules = device, host, clock, rules
        self._write_back = rules.write_policy == "write_back"
        self.keeps_locked_paths = not self._write_back  # `load_back` says why not
        self._write_hits = 1 if rules.write_policy == "write_through" else 2
        self._host_leaves: HostLeaves
        if rules.lists_host_leaves and self._write_back:
            self._host_leaves = ListedHostLeaves(self._policy)
        else:
            self._host_leaves = QueuedHostLeaves(self._policy)
        self.storage: StorageThreads | None = None
        self.d2h, self.h2d = Link(times.d2h_base, times.d2h_per_token), Link(times.h2d_base, times.h2d_per_token)
        self._writing: deque[tuple[int, TreeNode]] = deque()
        self._to_load: list[tuple[int, TreeNode]] = []
        self._loading: deque[tuple[int, list[TreeNode]]] = deque()
        self._being_written_back: dict[TreeNode, None] = {}

    # -- finding and adding

    def match_path(self, key: Runs, num_tokens: int) -> tuple[int, TreeNode, int, TreeNode]:
        """Like `match_prefix`, for both levels.

        Returns:
            Tokens on the device and the node where they end, tokens beyond that only the host holds, and the deepest
            matched node that the host holds.
        """
        depth, node = self.match_prefix(key, num_tokens)
        self._host_leaves.touch(node)
        host_hit, host_node = 0, node
        while not node.on_device:
            host_hit += node.length
            node = _parent(node)
        while not host_node.on_host:
            host_node = _parent(host_node)
        self._queue.touch(node)
        return depth - host_hit, node, host_hit, host_node

    def match_prefix(self, key: Runs, num_tokens: int) -> tuple[int, TreeNode]:
        """The longest prefix that any level holds; every node of the path gets an access time of its own."""
        page_size = self.page_size
        limit = num_tokens - num_tokens % page_size
        node = self.root_node
        self._touch(node)
        depth = index = offset = 0
        while depth < limit:
            child = node.children.get(edge_at(key, index, offset, page_size))
            if child is None:
                break
            self._touch(child)
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, limit - depth)
            if common < child.length:
                common -= common % page_size
                return depth + common, self._split(child, common)
            node = child
            depth += common
        return depth, node

    def _touch(self, node: TreeNode) -> None:
        self.time += 1
        node.last_access = self.time

    def extend(
        self,
        above: TreeNode,
        key: Runs,
        num_tokens: int,
        priority: int = 0,
        *,
        inserted_len: int = 0,  # noqa: ARG002 - counted from 0.5.11 on
        chunked: bool = False,
    ) -> tuple[int, TreeNode]:
        """See `RadixTree.extend`; copies nodes to the host as the write policy says.

        Returns:
            Tokens that were on the device already, and the node where the key ends.
        """
        limit = num_tokens - num_tokens % self.page_size
        for node in _path(above):
            self._touch(node)
            node.priority = max(node.priority, priority)
            self._count_hit(node, chunked=chunked)
        node = above
        depth = known = above.end
        index, offset = place_of(key, depth)
        while depth < limit:
            child = node.children.get(edge_at(key, index, offset, self.page_size))
            if child is None:
                break
            self._touch(child)
            child.priority = max(child.priority, priority)
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, limit - depth)
            partial = common < child.length
            if partial:
                common -= common % self.page_size
                child = self._split(child, common)
            node = child
            depth += common
            if node.on_device:
                self._count_hit(node, chunked=chunked)
                known += common
            else:
                self._attach(node)
            if partial:
                break
        if depth < limit:
            node = self._add_leaf(node, key, depth, limit, priority)
            self._count_hit(node, chunked=chunked)
        if self._is_free_leaf(node):
            self._queue.offer(node)
        return known, node

    def touch_path(self, node: TreeNode) -> None:
        """What `match_prefix` does on the way to a node."""
        self._touch(self.root_node)
        for part in _path(node):
            self._touch(part)

    def _attach(self, node: TreeNode) -> None:
        """A host node has been computed again."""
        node.on_device = True
        self.evictable += node.length
        self._host_leaves.update(node)

    def _split(self, lower: TreeNode, at: int) -> TreeNode:
        upper = super()._split(lower, at)
        upper.hit_count = lower.hit_count
        self._host_leaves.touch(lower)
        return upper

    def insert_host(self, node: TreeNode, key: Runs, start: int, end: int) -> int:
        """Add tokens `start` to `end` of a key, read from storage, below a host node; returns how many were there."""
        self._touch(node)
        depth = start
        index, offset = place_of(key, start)
        while depth < end:
            child = node.children.get(edge_at(key, index, offset, self.page_size))
            if child is None:
                break
            self._touch(child)
            common, index, offset = common_prefix(child.runs, key, index, offset)
            common = min(common, end - depth)
            partial = common < child.length
            if partial:
                common -= common % self.page_size
                child = self._split(child, common)
            node = child
            depth += common
            if partial:
                break
        self._queue.touch(node)
        self._host_leaves.touch(node)
        if depth < end:
            leaf = self._add_leaf(node, key, depth, end, node.priority)
            self.evictable -= leaf.length
            leaf.on_device, leaf.on_host = False, True
            self._host_leaves.update(leaf)
            self._host_leaves.update(node)
        return depth - start

    # -- device to host

    def _count_hit(self, node: TreeNode, *, chunked: bool) -> None:
        if self._write_back or chunked:
            return
        node.hit_count += 1
        if not node.on_host and node.hit_count >= self._write_hits:
            self.observer.backed_up(node, self._copy_to_host(node))

    def _copy_to_host(self, node: TreeNode) -> int:
        """Queue a copy (`write_backup`); returns its tokens, 0 if the host has no room for it."""
        if not self.host.alloc(node.length):
            self.evict_host(node.length)
            if not self.host.alloc(node.length):
                return 0
        node.on_host = True
        self._writing.append((self.d2h.send(self._clock.now_ns, node.length), node))
        if not self._write_back:
            self.inc_lock_ref(node)
        return node.length

    def check_writes(self) -> None:
        """Unlock nodes whose copies have ended, and send them on to storage."""
        while self._writing and self._writing[0][0] <= self._clock.now_ns:
            node = self._writing.popleft()[1]
            self.dec_lock_ref(node)
            self._store(node)

    def _store(self, node: TreeNode) -> None:
        if self.storage is not None:
            self.observer.storing(node)
            self.storage.backup(node)
            node.host_ref += 1

    def release_host(self, node: TreeNode) -> None:
        """A transfer lets go of a node on the host."""
        node.host_ref -= 1
        if node.host_ref == 0:
            self._host_leaves.released(node)

    def _await_writes(self) -> None:
        """Wait for all copies (`writing_check(write_back=True)`)."""
        while self._writing:
            end_ns, node = self._writing.popleft()
            self._clock.advance(end_ns)
            if self.storage is not None:
                self.storage.advance(self._clock.now_ns)
            if self._rules.stores_written_back:
                self._store(node)

    # -- eviction

    def _is_free_leaf(self, node: TreeNode) -> bool:
        if node.lock_ref > 0 or not node.on_device or not node.alive or node in self._being_written_back:
            return False
        if not node.children:
            return True
        return not any(child.on_device and child not in self._being_written_back for child in node.children.values())

    def evict(self, num_tokens: int) -> int:
        """Free at least `num_tokens` of the device, if that many are evictable; returns tokens freed."""
        num_evicted = 0
        if num_tokens <= 0:
            return 0
        offered_twice: set[TreeNode] = set()
        for node in self._queue.drain():
            if node.on_host:
                if _is_cut_off(node):
                    offered_twice.add(_parent(node))
                self._leave_device(node)
                num_evicted += node.length
            elif self._write_back:
                num_copied = self._copy_to_host(node)
                self.observer.backed_up(node, num_copied)
                num_evicted += num_copied
                self._being_written_back[node] = None
            else:
                self._drop(node)
                num_evicted += node.length
            parent = _parent(node)
            if self._is_free_leaf(parent):
                self._queue.offer(parent)
            if num_evicted >= num_tokens:
                break
            if node in offered_twice or (parent in offered_twice and not parent.on_device):
                raise UpstreamStopError("a node is evicted from the device twice: SGLang 0.5.9 stops here (write_back)")
        if self._write_back:
            self._finish_write_back()
        return num_evicted

    def _finish_write_back(self) -> None:
        self._await_writes()
        written = list(self._being_written_back)
        self._being_written_back.clear()
        for node in written:
            if not node.on_host:
                raise UpstreamStopError("the host has no room for an evicted node: SGLang stops here (write_back)")
            self._leave_device(node)

    def _leave_device(self, node: TreeNode) -> None:
        """Free the device copy of a node that the host holds."""
        self._free_device(node)
        self.evictable -= node.length
        node.on_device = False
        self._host_leaves.update(node)

    def _free_device(self, node: TreeNode) -> None:
        self.observer.evicted(node)
        self.num_evicted += node.length
        self._device.free(node.length)

    def _drop(self, node: TreeNode) -> None:
        """Drop a node that only the device holds, and the nodes below it, which nobody can find any more."""
        self._free_device(node)
        self._delete_leaf(node)
        if not self._rules.lists_host_leaves:
            below = list(node.children.values())
            while below:
                child = below.pop()
                child.alive = False
                below.extend(child.children.values())

    def evict_host(self, num_tokens: int) -> None:
        """Drop host leaves until at least `num_tokens` are free or none is left."""
        num_freed = 0
        for node in self._host_leaves.drain():
            if node.host_ref > 0:
                continue
            num_freed += node.length
            self.host.free(node.length)
            parent = _parent(node)
            if _is_cut_off(node):
                raise UpstreamStopError("a host node is dropped before its child: SGLang 0.5.9 stops here (write_back)")
            self.observer.dropped_from_host(node)
            del parent.children[node.edge]
            node.alive = False
            self._host_leaves.drop(node)
            self._host_leaves.update(parent)
            if not parent.children and not parent.on_device:
                self._host_leaves.join(parent)
            if num_freed >= num_tokens:
                break
        self.observer.evicted_host(num_tokens, num_freed)

    # -- host to device

    def load_back(self, node: TreeNode) -> TreeNode:
        """Bring the path to a host node to the device, all of it or nothing; returns where the device's prefix ends.

        Upstream's `load_back` protects only the ancestor on the device. Under write_back the eviction that makes room
        copies nodes to the host, and where the host is full, `evict_host` may drop the very nodes that are about to be
        loaded. They are loaded all the same, but nothing in the tree leads to them: the request inserts their slots a
        second time, and from then on these are counted twice. 0.5.9 evicts a node that was cut off like any other (its
        list of device leaves holds it), 0.5.6 never does (it looks for leaves from the root). SGLang goes on until its
        self-check at the next idle moment (`SglangScheduler.note_idle`).
        """
        path = []
        ancestor = node
        while not ancestor.on_device:
            path.append(ancestor)
            ancestor = _parent(ancestor)
        if not path:
            return node
        num_tokens = sum([part.length for part in path])
        self.inc_lock_ref(ancestor)
        has_room = num_tokens >= _LOAD_BACK_TOKENS and self._allocate(num_tokens)
        self.dec_lock_ref(ancestor)
        if not has_room:
            self.observer.loaded_back(node, 0)
            return ancestor
        for part in path:
            part.on_device = True
            part.alive = part.alive or self._rules.lists_host_leaves
            self._host_leaves.update(part)
        self.evictable += num_tokens
        self.inc_lock_ref(node)
        self._to_load.append((num_tokens, node))
        self.observer.loaded_back(node, num_tokens)
        return node

    def _allocate(self, num_tokens: int) -> bool:
        if self._device.alloc(num_tokens):
            return True
        self.evict(num_tokens)
        return self._device.alloc(num_tokens)

    def start_loading(self) -> int | None:
        """Send the loads asked for, as one; returns when it ends."""
        if not self._to_load:
            return None
        end_ns = self.h2d.send(self._clock.now_ns, sum([num_tokens for num_tokens, _ in self._to_load]))
        self._loading.append((end_ns, [node for _, node in self._to_load]))
        self._to_load = []
        return end_ns

    def check_loads(self) -> None:
        """Unlock nodes whose loads have ended."""
        while self._loading and self._loading[0][0] <= self._clock.now_ns:
            for node in self._loading.popleft()[1]:
                self.dec_lock_ref(node)

    def next_ack_ns(self) -> int | None:
        """When the next copy or load after now ends."""
        ends_ns = [end_ns for end_ns, _ in self._writing] + [end_ns for end_ns, _ in self._loading]
        coming = [end_ns for end_ns in ends_ns if end_ns > self._clock.now_ns]
        return min(coming) if coming else None


def _parent(node: TreeNode) -> TreeNode:
    assert node.parent is not None
    return node.parent


def _path(node: TreeNode) -> list[TreeNode]:
    """The nodes from below the root down to a node."""
    path = []
    while (parent := node.parent) is not None:
        path.append(node)
        node = parent
    path.reverse()
    return path


def _is_cut_off(node: TreeNode) -> bool:
    """Whether host eviction has taken a node out of the tree before it was loaded (see `load_back`)."""
    return _parent(node).children.get(node.edge) is not node
